"""Settings and commands on the documentation's pages: keys exist, configs load, the commands of fine-tuning work."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from config_keys import config_keys
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.config.model import ModelConfig
from scalevit.models.build import build_model
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.write import write_weights
from scalevit.training.banner import weights_line
from scalevit.training.run import prepare, prepare_evaluation
from scalevit.tying import canonical_state, tied_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    DOCS.parent / "README.md",
    *(page for page in sorted(DOCS.glob("*.md")) if page.stem not in ("log", "extending", "architecture")),
]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = "vit_small_patch16_224"


def code(page: Path, language: str = "") -> list[str]:
    return [text for kind, text in CODE.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_settings_on_a_page_exist(page: Path) -> None:
    keys = config_keys()
    free = [key for key, field in keys.items() if field.get("additionalProperties") is True]
    sections = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    text = re.sub(r"^- Upstream command: .*$", "", page.read_text(), flags=re.MULTILINE)  # of other programs
    named = set(re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_.]*[a-z_0-9])(?==| |`)", text))
    files = {name for name in named if Path(name).suffix in (".py", ".json", ".csv", ".md", ".safetensors")}
    wrong = [name for name in named - files - keys.keys() if not name.startswith(tuple(f"{key}." for key in free))]
    assert wrong == []


@pytest.mark.parametrize("name", ["getting-started", "fine-tuning"])
def test_the_config_on_a_page_is_valid(name: str, tmp_path: Path) -> None:
    (config,) = code(DOCS / f"{name}.md", "json")
    (tmp_path / "my.json").write_text(config)
    load_config(tmp_path / "my.json")


# --- fine-tuning ------------------------------------------------------------------------------------------

FINE_TUNING = DOCS / "fine-tuning.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page starts from: images, shards, weights of timm, and a grouped run."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    (folder / "tuned.json").write_text(code(FINE_TUNING, "json")[0])
    torch.save(timm.create_model(MODEL).state_dict(), folder / "vit_small.pth")
    for number in range(24):
        for part in ("train", "validation"):
            for name in ("cat", "dog", "owl"):
                path = folder / "photos" / part / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (number * 10, 0, 0)).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for part in ("train", "validation"):
            for name in ("photos", "birds"):
                main(["shards", "write", "--source", f"photos/{part}", "--destination", f"data/{name}/{part}"])
    for name, reduction in (("photos", GroupedReduction()), ("photos_tuned", NoReduction())):
        model = ModelConfig(name=MODEL, num_classes=3)
        network = build_model(model, reduction, seed=0)
        run = folder / "runs" / name
        run.mkdir(parents=True)
        tensors = canonical_state(network)
        write_weights(run / "best_ema.safetensors", tensors, model=model, reduction=reduction, tied=tied_names(network))
        (run / "classes.json").write_text(json.dumps(["cat", "dog", "owl"]))
    return folder


def train_commands() -> list[list[str]]:
    text = "\n".join(code(FINE_TUNING)).replace("\\\n", " ")
    return [
        shlex.split(line)[4:] for line in text.splitlines() if line.startswith("scalevit train --config tuned.json")
    ]


@pytest.mark.parametrize("settings", train_commands(), ids=" ".join)
def test_the_commands_of_fine_tuning_can_start(
    settings: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    prepare(load_config("tuned.json", settings))


def test_the_banner_on_the_page_is_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = load_config("tuned.json", ["reduction.strategy=grouped"])
    found: list[Coverage] = []
    build_model(config.model, config.reduction, seed=0, device="meta", on_weights=found.append)
    line = weights_line(config, found[0])
    # The page shows the depth of the real model; the test's has fewer blocks.
    counts = re.compile(r"\d+ of \d+ tensors")
    assert counts.sub("", f"weights  {line}") in counts.sub("", "\n".join(code(FINE_TUNING)))


def test_a_fine_tuned_run_is_evaluated_and_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    prepare_evaluation(load_config("tuned.json", ["model.initial_weights=runs/photos_tuned/best_ema.safetensors"]))
    (program,) = code(FINE_TUNING, "python")
    exec(program, {})
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["cat", "dog", "owl"]
