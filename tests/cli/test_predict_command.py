"""`scalevit predict` as a user calls it."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from commands import refused
from launching import QUICKSTART, Workplace
from scalevit.checkpoint.saver import Saver
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.config.training import CheckpointConfig
from scalevit.data.loading.readers import open_reader
from scalevit.data.shards.index import load_index
from scalevit.distributed import World
from scalevit.engines.state import TensorSlice
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


@pytest.fixture(scope="module")
def evaluation(run_folder: Path) -> dict[str, float]:
    done = Workplace(run_folder).evaluate(str(run_folder))
    assert done.status == 0, done.errors
    return json.loads(done.output)


def test_predictions_are_those_of_an_evaluation(
    run_folder: Path, evaluation: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = predict(capsys, run_folder, run_folder / "images", "--json", "--batch", "50")
    assert (status, err) == (0, f"weights: {run_folder / 'best.safetensors'}\n")
    found = [json.loads(line) for line in out.splitlines()]
    labels = [int(Path(entry["image"]).parent.name) for entry in found]
    ranks = [[each["label"] for each in entry["predictions"]] for entry in found]
    top1 = np.mean([ranked[0] == label for ranked, label in zip(ranks, labels, strict=True)])
    top5 = np.mean([label in ranked for ranked, label in zip(ranks, labels, strict=True)])
    assert 100 * top1 == pytest.approx(evaluation["top1"])
    assert 100 * top5 == pytest.approx(evaluation["top5"])
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


# --- other sources ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path) -> Path:
    """Of the same weights, with an EMA that has twice each weight."""
    config = load_config(run_folder / "config.json")
    tensors = load_file(run_folder / "best.safetensors")
    slices = {
        f"{part}.{name}": TensorSlice(factor * tensor.flatten(), 0, tensor.shape)
        for part, factor in (("weights", 1.0), ("ema", 2.0))
        for name, tensor in tensors.items()
    }
    record = {
        **{key: {} for key in ("state", "optimizer", "loss_scale", "tied", "versions")},
        "score": None,
        "config": config.model_dump(mode="json"),
        "data": None,
        "classes": NAMES,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "parts": ["ema", "weights"],
        "world_size": 1,
    }
    one_rank = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
    Saver(run_folder / "checkpoints", one_rank, CheckpointConfig()).write(4, slices, record)
    return run_folder / "checkpoints" / "step-00000004"


def probabilities(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[tuple[str, float]]]:
    status, out, err = predict(capsys, *arguments, "--json", "--top", "10")
    assert status == 0, err
    found = [json.loads(line)["predictions"] for line in out.splitlines()]
    return [sorted((each["class"], each["probability"]) for each in row) for row in found]


def assert_close(found: list[list[tuple[str, float]]], expected: list[list[tuple[str, float]]]) -> None:
    """Equal up to rounding in fp32: a softmax of logits that differ by 1e-6."""
    assert [[name for name, _ in row] for row in found] == [[name for name, _ in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert [value for _, value in row] == pytest.approx([value for _, value in other], abs=1e-5)


def test_a_checkpoint_predicts_as_its_weights_files_do(
    run_folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = run_folder / "images" / "7"
    expected = probabilities(capsys, run_folder, images)
    assert_close(probabilities(capsys, checkpoint, images, "--weights", "weights"), expected)
    assert_close(probabilities(capsys, checkpoint.parent, images, "--weights", "weights"), expected)
    status, _, err = predict(capsys, checkpoint, images, "--top", "1")
    assert (status, err) == (0, f"weights: EMA of {checkpoint}\n")
    assert probabilities(capsys, checkpoint, images) == probabilities(capsys, checkpoint, images, "--weights", "ema")
    assert probabilities(capsys, checkpoint, images) != expected


@pytest.mark.parametrize(("form", "name"), [("timm", "x.safetensors"), ("huggingface", "x"), ("torch", "x.pt2")])
def test_an_export_predicts_as_the_run_does(
    form: str, name: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without anything beside it: an export says itself how images are prepared."""
    main(["export", str(run_folder), str(tmp_path / name), "--to", form])
    capsys.readouterr()
    images = run_folder / "images" / "7"
    assert_close(probabilities(capsys, tmp_path / name, images), probabilities(capsys, run_folder, images))
    if form == "huggingface":
        message = refused(capsys, "predict", tmp_path / "x" / "model.safetensors", images)
        assert message == (
            f"error: {tmp_path}/x/model.safetensors: is part of the export {tmp_path}/x: name the folder\n"
        )


def test_an_onnx_file_predicts_and_is_evaluated_as_the_run(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    main(["export", str(run_folder), str(tmp_path / "x.onnx"), "--to", "onnx"])
    capsys.readouterr()
    images = run_folder / "images"
    found = probabilities(capsys, tmp_path / "x.onnx", images)
    assert_close(found, probabilities(capsys, run_folder, images))
    shards = load_config(run_folder / "config.json").data.validation
    main(["evaluate", str(tmp_path / "x.onnx"), f"data.validation={shards}", "data.workers=0"])
    result = json.loads(capsys.readouterr().out)
    _, out, _ = predict(capsys, run_folder, images, "--json", "--top", "1")
    right = [
        Path(row["image"]).parent.name == row["predictions"][0]["class"] for row in map(json.loads, out.splitlines())
    ]
    assert result["top1"] == pytest.approx(100 * np.mean(right))


def test_a_weights_file_of_ours_needs_no_config(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run_folder / "best.safetensors").read_bytes())
    status, out, _ = predict(capsys, alone, run_folder / "images" / "3", "--top", "1", "--csv")
    assert status == 0
    assert len(out.splitlines()) == 1 + len(list((run_folder / "images" / "3").iterdir()))


def test_a_checkpoint_is_evaluated(run_folder: Path, evaluation: dict[str, float], checkpoint: Path) -> None:
    done = Workplace(run_folder).evaluate(str(checkpoint), "--weights", "weights")
    assert done.status == 0, done.errors
    assert json.loads(done.output) == {**evaluation, "weights": f"weights of {checkpoint}"}
