"""`scalevit predict` as a user calls it."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import refused
from launching import QUICKSTART, run
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.data.loading.readers import open_reader
from scalevit.data.shards.index import load_index
from scalevit.models.build import build_model
from scalevit.models.weights.write import write_weights

NAMES = [str(number) for number in range(10)]
SETTINGS = {
    "extends": QUICKSTART,
    "model": {"kwargs": {"depth": 1, "embed_dim": 24}},
    "engine": {"name": "fsdp"},
    "reduction": {"strategy": "none"},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run with weights that were not trained, and the validation images as files: images/LABEL/NUMBER.png."""
    folder = tmp_path_factory.mktemp("run")
    settings = {**SETTINGS, "data": {"builtin": None, "workers": 0, "validation": str(digits / "validation")}}
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_config(folder / "config.json", [])
    model = build_model(config.model, config.reduction, seed=0)
    about = {"model": config.model, "reduction": config.reduction, "tied": {}, "classes": NAMES}
    write_weights(folder / "best.safetensors", dict(model.named_parameters()), **about)
    index = load_index(digits / "validation")
    reader = open_reader(index)
    for sample, label in enumerate(index.label.tolist()):
        (folder / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / "images" / str(label) / f"{sample}.png").write_bytes(reader.read(sample))
    return folder


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        main(["predict", *map(str, arguments)])
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_predictions_are_those_of_an_evaluation(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = predict(capsys, run_folder, run_folder / "images", "--json", "--batch", "50")
    assert (status, err) == (0, f"weights: {run_folder / 'best.safetensors'}\n")
    found = [json.loads(line) for line in out.splitlines()]
    labels = [int(Path(entry["image"]).parent.name) for entry in found]
    ranks = [[each["label"] for each in entry["predictions"]] for entry in found]
    top1 = np.mean([ranked[0] == label for ranked, label in zip(ranks, labels, strict=True)])
    top5 = np.mean([label in ranked for ranked, label in zip(ranks, labels, strict=True)])
    evaluated = run([sys.executable, "-m", "scalevit", "evaluate", str(run_folder)], cwd=run_folder)
    assert evaluated.status == 0, evaluated.errors
    result = json.loads(evaluated.output)
    assert 100 * top1 == pytest.approx(result["top1"])
    assert 100 * top5 == pytest.approx(result["top5"])
    first = found[0]["predictions"]
    assert all(each["class"] == NAMES[each["label"]] for each in first)
    assert [each["probability"] for each in first] == sorted((each["probability"] for each in first), reverse=True)


def test_the_forms_of_the_output_agree(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((run_folder / "images" / "3").iterdir())
    arguments = (run_folder / "best.safetensors", image, "--top", "20")
    _, shown, _ = predict(capsys, *arguments, "--json")
    found = json.loads(shown)["predictions"]
    assert sum(each["probability"] for each in found) == pytest.approx(1.0)
    _, table, _ = predict(capsys, *arguments, "--csv")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [(int(row["label"]), row["class"]) for row in rows] == [(each["label"], each["class"]) for each in found]
    _, text, _ = predict(capsys, *arguments)
    pairs = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in found)
    assert text == f"{image}: {pairs}\n"


def test_images_of_any_kind_and_bad_ones(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    for name in ("a.gif", "b.bmp", "c.tiff", "d.webp", "e.jpg"):
        picture.save(tmp_path / name)
    (tmp_path / "f.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("left out")
    status, out, err = predict(capsys, run_folder, tmp_path)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(tmp_path / name) for name in ("a.gif", "b.bmp", "c.tiff", "d.webp", "e.jpg")
    ]
    assert err.splitlines()[1:] == [f"warning: image {tmp_path}/f.png: cannot be decoded (unknown image format)"]
    status, out, err = predict(capsys, run_folder, tmp_path / "f.png", "--json")
    assert (status, err.count("\n")) == (1, 1)
    assert json.loads(out)["error"].startswith("cannot be decoded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "the following arguments are required: IMAGE"),
        (["RUN", "no.png"], "image no.png: no such file"),
        (["RUN", "empty"], "folder empty: has no images"),
        (["empty", "RUN/images"], "run folder empty: has none of best_ema.safetensors"),
        (["RUN", "RUN/images", "--top", "0"], "argument --top: 0: must be at least 1"),
        (
            ["RUN/best.safetensors", "RUN/images", "--config", "three.json"],
            "have a classifier of 10 classes, but model.num_classes = 3",
        ),
    ],
)
def test_mistakes_are_one_line(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("three.json").write_text(json.dumps({"extends": str(run_folder / "config.json"), "model": {"num_classes": 3}}))
    assert message in refused(capsys, "predict", *(argument.replace("RUN", str(run_folder)) for argument in arguments))
