"""The code of docs/extending.md works: it is added to a copy of the package, file by file, and used.

Each example touches at most two files, as the page says. One process runs them all, since imports take seconds.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launching import SECONDS, free_port

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "extending.md"
BLOCK = re.compile(r'```(python|diff) title="([^"]+)"\n(.*?)```\n', re.DOTALL)

SCRIPT = """
import json, os, sys
from pathlib import Path

import torch

from scalevit.cli.main import main
from scalevit.data.images import encode_png
from scalevit.models.build import build_model
from scalevit.config.loading import load_config
from scalevit.models.costs import model_costs

TINY = ["--config", "quickstart", "model.kwargs.depth=2", "model.kwargs.embed_dim=48", "train.max_steps=2",
        "train.log_every_steps=1", "data.workers=0", "train.global_batch=32", "train.micro_batch=16",
        "train.checkpoint.every_epochs=50", "engine.name=fsdp"]  # DeepSpeed runs once per process

def train(name, *settings):
    main(["train", *TINY, f"name={name}", *settings])

train("optimizer", "optimizer.name=lion", "optimizer.lr=1e-4")
train("schedule", "schedule.name=step", 'schedule.args={"decay_epochs": 20, "decay_rate": 0.1}')
train("loss", "loss.name=focal", "loss.gamma=1.5", "tracking.text.enabled=true")
train("reduction", "reduction.strategy=alternate")
teacher = ('{"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 10}')
train("task", "task.name=distillation", "task.teacher=vit_tiny_patch16_224", f"task.teacher_kwargs={teacher}")

beit = load_config(None, ["model.name=beit_base_patch16_224", "reduction.strategy=grouped",
                          "model.kwargs.depth=4", "model.kwargs.embed_dim=48", "model.kwargs.num_heads=3",
                          "model.num_classes=3"])
costs = {"beit": model_costs(beit.model, beit.reduction).unique_mlps}
build_model(beit.model, beit.reduction, seed=0)(torch.rand(1, 3, 224, 224))

images = Path("images")
images.mkdir()
for number in range(4):
    (images / f"{number}.png").write_bytes(encode_png(torch.full((8, 8), number, dtype=torch.uint8).numpy()))
(images / "list.txt").write_text("".join(f"{number}.png {number % 2}\\n" for number in range(4)))
main(["shards", "write", "--list", "images/list.txt", "--destination", "listed", "--workers", "0"])
print(json.dumps(costs))
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
    """What the extended copy did: its run folders, and the last line that it printed."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPOSITORY / "scalevit", folder / "scalevit", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, path, content in examples():
        file = folder / path
        file.write_text(content if kind == "python" else apply_diff(file.read_text(), content))
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {"folder": folder, "printed": json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("name", ["optimizer", "schedule", "loss", "reduction", "task"])
def test_a_run_uses_the_extension(outcome: dict[str, Any], name: str) -> None:
    run = outcome["folder"] / "runs" / name
    config = json.loads((run / "config.json").read_text())
    used = {
        "optimizer": config["optimizer"]["name"] == "lion",
        "schedule": config["schedule"]["name"] == "step",
        "loss": config["loss"] == {"name": "focal", "gamma": 1.5},
        "reduction": config["reduction"]["strategy"] == "alternate",
        "task": config["task"]["name"] == "distillation",
    }
    assert used[name]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2]
    if name == "task":
        assert "loss_divergence" in records[0]


def test_the_tracker_gets_every_record(outcome: dict[str, Any]) -> None:
    run = outcome["folder"] / "runs" / "loss"
    assert len((run / "log.txt").read_text().splitlines()) == len((run / "metrics.jsonl").read_text().splitlines())


def test_the_family_is_reduced(outcome: dict[str, Any]) -> None:
    assert outcome["printed"]["beit"] == 2, "4 blocks in pairs"


def test_the_source_is_written(outcome: dict[str, Any]) -> None:
    assert json.loads((outcome["folder"] / "listed" / "set.json").read_text())["samples"] == 4


def test_each_change_touches_at_most_two_files() -> None:
    sections = re.split(r"\n## ", PAGE.read_text())[1:]
    touched = {section.splitlines()[0]: {path for _, path, _ in BLOCK.findall(section)} for section in sections}
    assert len(touched) == 10
    assert all(len(paths) <= 2 for paths in touched.values()), touched
