"""The code of docs/extending.md works: it is added to a copy of the package, file by file, and used.

Each touches the files that the page's table lists. One process runs them all, since imports take seconds.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import architecture
from launching import SECONDS, free_port
from scalevit.engines.base import Engine
from scalevit.engines.settings import EngineSettings

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "extending.md"
BLOCK = re.compile(r'```(python|diff) title="([^"]+)"\n(.*?)```\n', re.DOTALL)

SCRIPT = """
import json, os
from contextlib import redirect_stdout
from pathlib import Path

import torch

from scalevit.cli.main import main
from scalevit.data.images import encode_png
from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.training.run import prepare

TINY = ["--config", "quickstart", "model.kwargs.depth=2", "model.kwargs.embed_dim=48", "train.max_steps=2",
        "train.log_every_steps=1", "data.workers=0", "train.global_batch=32", "train.micro_batch=16",
        "train.checkpoint.every_epochs=50", "engine.name=fsdp"]  # DeepSpeed runs once per process

def train(name, *settings):
    main(["train", *TINY, f"name={name}", *settings])

def train_on_two_ranks(name, *settings):  # by a fork, so before any run of this process
    child = os.fork()
    rank = "0" if child else "1"
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= ranks
    train(name, *settings)
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for key in ranks:
        del os.environ[key]

FAST = ["schedule.warmup_epochs=0", "optimizer.lr=1e-2"]  # so that a lost update or state would show
train_on_two_ranks("engine-2-ranks", *FAST, "engine.name=replicated")
train("engine", *FAST, "engine.name=replicated")
train("engine", *FAST, "engine.name=fsdp", "train.max_steps=4")  # resumes
train("fsdp", *FAST)
train("fsdp", *FAST, "engine.name=replicated", "train.max_steps=4")  # resumes
train("undisturbed", *FAST, "train.max_steps=4")
with open("plan.json", "w") as file, redirect_stdout(file):
    main(["plan", *TINY, "engine.name=replicated", "--gpus", "2", "--json"])
main(["checkpoint", "convert", "runs/fsdp", "model.safetensors"])
main(["export", "model.safetensors", "model.npz", "--to", "numpy"])

train("optimizer", "optimizer.name=lion", "optimizer.lr=1e-4")
train("schedule", "schedule.name=step", 'schedule.args={"decay_epochs": 20, "decay_rate": 0.1}')
train("loss", "loss.name=focal", "loss.gamma=1.5", "tracking.text.enabled=true")
train("reduction", "reduction.strategy=alternate")
train("task", "task.name=mirrored", "task.weight=0.5")

useless = ["task.name=mirrored", "task.weight=0"]
try:
    prepare(load_config("quickstart", [*TINY[2:], "name=refused", *useless]))
except UserError as error:
    refused = str(error)

printed = {"refused": refused}

images = Path("images")
images.mkdir()
for number in range(4):
    (images / f"{number}.png").write_bytes(encode_png(torch.full((8, 8), number, dtype=torch.uint8).numpy()))
(images / "list.txt").write_text("".join(f"{number}.png {number % 2}\\n" for number in range(4)))
main(["shards", "write", "--list", "images/list.txt", "--destination", "listed", "--workers", "0"])
print(json.dumps(printed))
"""


def examples() -> list[tuple[str, str, str]]:
    """(kind of block, path, content)"""
    return BLOCK.findall(PAGE.read_text())


def apply_diff(text: str, diff: str) -> str:
    """Applies lines with " ", "-" and "+", each found after the one before it."""
    lines, here = text.splitlines(), 0
    for line in diff.splitlines():
        mark, content = line[:1], line[1:]
        if mark == "+":
            lines.insert(here, content)
            here += 1
            continue
        assert content in lines[here:], f"the page shows a line that is not there: {content!r}"
        here = lines.index(content, here)
        if mark == "-":
            del lines[here]
        else:
            here += 1
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the extended copy did: its run folders, the last line that it printed, and its sources."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPOSITORY / "scalevit", folder / "scalevit", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, path, content in examples():
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if kind == "python" else apply_diff(file.read_text(), content))
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    return {"folder": folder, "printed": printed, "sources": architecture.Sources(folder)}


@pytest.mark.parametrize("name", ["optimizer", "schedule", "loss", "reduction", "task"])
def test_a_run_uses_the_extension(outcome: dict[str, Any], name: str) -> None:
    run = outcome["folder"] / "runs" / name
    config = json.loads((run / "config.json").read_text())
    used = {
        "optimizer": config["optimizer"]["name"] == "lion",
        "schedule": config["schedule"]["name"] == "step",
        "loss": config["loss"] == {"name": "focal", "gamma": 1.5},
        "reduction": config["reduction"]["strategy"] == "alternate",
        "task": config["task"] == {"name": "mirrored", "weight": 0.5},
    }
    assert used[name]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]
    if name == "task":
        assert "loss_divergence" in next(record for record in records if record["kind"] == "train")


def test_the_tracker_gets_every_record(outcome: dict[str, Any]) -> None:
    run = outcome["folder"] / "runs" / "loss"
    assert len((run / "log.txt").read_text().splitlines()) == len((run / "metrics.jsonl").read_text().splitlines())


def test_the_task_is_checked_before_the_run(outcome: dict[str, Any]) -> None:
    message = "config: task.weight = 0.0: compares nothing: use task.name=classification"
    assert outcome["printed"]["refused"] == message
    assert not (outcome["folder"] / "runs" / "refused").exists()


def test_the_source_is_written(outcome: dict[str, Any]) -> None:
    assert json.loads((outcome["folder"] / "listed" / "set.json").read_text())["samples"] == 4


def test_the_exporter_writes_every_tensor(outcome: dict[str, Any]) -> None:
    arrays, tensors = np.load(outcome["folder"] / "model.npz"), load_file(outcome["folder"] / "model.safetensors")
    assert sorted(arrays.files) == sorted(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(arrays[name], tensor), name


@pytest.mark.parametrize("run", ["engine", "fsdp", "engine-2-ranks"])
def test_the_engine_trains_like_fsdp_and_moves_to_and_from_it(outcome: dict[str, Any], run: str) -> None:
    undisturbed, ours = (
        [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == "train"]
        for path in (outcome["folder"] / "runs" / name / "metrics.jsonl" for name in ("undisturbed", run))
    )
    assert [record["step"] for record in ours] == ([1, 2] if run == "engine-2-ranks" else [1, 2, 3, 4])
    for record, expected in zip(ours, undisturbed, strict=False):
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(expected[key], rel=1e-4), (record["step"], key)
    assert undisturbed[0]["loss"] != pytest.approx(undisturbed[3]["loss"], rel=1e-2), "the weights change"


def test_the_engine_is_planned(outcome: dict[str, Any]) -> None:
    assert '"replicated"' in (outcome["folder"] / "plan.json").read_text()


@pytest.mark.parametrize("rule", architecture.RULES, ids=lambda rule: rule.__name__)
def test_the_code_follows_the_rules(outcome: dict[str, Any], rule: Any) -> None:
    assert rule(outcome["sources"]) == []


def test_each_change_touches_the_files_that_the_table_lists() -> None:
    """At most one new and one changed, where the folder of an engine is one."""
    introduction, *sections = re.split(r"\n## ", PAGE.read_text())
    rows = re.findall(r"^\| \[[^]]+\]\(#([^)]+)\).*?\|(.*)\|(.*)\|$", introduction, re.MULTILINE)
    table = {title: [re.findall("`([^`]+)`", column) for column in columns] for title, *columns in rows}
    assert len(table) == len(sections) == 10
    for section in sections:
        title = section.splitlines()[0].lower().replace(" ", "-")
        blocks = [(kind, path) for kind, path, _ in BLOCK.findall(section)]
        new, changed = ({path for kind, path in blocks if kind == wanted} for wanted in ("python", "diff"))
        if title == "an-engine":
            new = {f"{Path(path).parent}/" for path in new}
        assert [new, changed] == [set(paths) for paths in table[title]], title
        assert max(len(new), len(changed)) <= 1, title


def test_the_page_lists_what_an_engine_must_define() -> None:
    listed = {
        what: set(re.findall("`([^`]+)`", names))
        for what, names in re.findall(
            r"^- (settings|engine, a step|engine, state): (.*)$", PAGE.read_text(), re.MULTILINE
        )
    }
    of_settings = {
        name
        for name, member in vars(EngineSettings).items()
        if isinstance(member, property | FunctionType)
        and "raise NotImplementedError" in inspect.getsource(getattr(member, "fget", member))
    }
    assert listed.pop("settings") == {"name", *of_settings}
    assert set().union(*listed.values()) == Engine.__abstractmethods__
