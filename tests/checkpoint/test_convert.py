"""`scalevit checkpoint`: what it prints, makes and refuses."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from resume_worker import read_alone
from scalevit.checkpoint.folder import list_checkpoints, read_record
from scalevit.checkpoint.saver import Saver
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.config.training import CheckpointConfig
from scalevit.distributed import World
from scalevit.engines.deepspeed.checkpoints import DeepSpeedCheckpoint
from scalevit.engines.state import TensorSlice
from scalevit.export.deepspeed_checkpoint import write_checkpoint
from scalevit.models.build import build_model

TINY = [
    "model.name=vit_tiny_patch16_224",
    "model.image_size=16",
    "model.num_classes=5",
    'model.kwargs={"patch_size": 4, "embed_dim": 36, "depth": 2, "num_heads": 2}',
    "reduction.strategy=grouped",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one checkpoint, made without an engine."""
    config = load_config(None, TINY)
    model = build_model(config.model, config.reduction, seed=1)
    weights = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    averages = {name: torch.rand_like(tensor) for name, tensor in weights.items()}
    optimizer_state = {"exp_avg": averages, "exp_avg_sq": {name: 2 * tensor for name, tensor in averages.items()}}
    scalars = {"step": dict.fromkeys(weights, torch.tensor(6.0))}
    native = DeepSpeedCheckpoint(7, shapes, weights, optimizer_state, scalars)
    folder = tmp_path_factory.mktemp("convert") / "run"
    write_checkpoint(native, folder, config)
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    main(["checkpoint", *map(str, arguments)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["checkpoint", *map(str, arguments)])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_inspect(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "intact" in call(capsys, "inspect", run_folder)
    (checkpoint,) = list_checkpoints(run_folder / "checkpoints")
    assert "grouped" in call(capsys, "inspect", checkpoint)
    (about,) = json.loads(call(capsys, "inspect", run_folder, "--json"))
    config = load_config(None, TINY)
    own = sum(p.numel() for p in build_model(config.model, config.reduction, seed=1).parameters())
    assert (about["step"], about["optimizer_scalars"], about["parameters"], about["damage"]) == (
        7,
        {"step": 6},
        own,
        [],
    )


def test_a_weights_file(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "convert", run_folder, tmp_path / "model.safetensors")
    config = load_config(None, [*TINY, f"model.initial_weights={tmp_path / 'model.safetensors'}"])
    expected = build_model(load_config(None, TINY).model, config.reduction, seed=1)
    loaded = build_model(config.model, config.reduction, seed=2)
    for (name, ours), theirs in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tied = json.loads(file.metadata()["scalevit"])["tied"]
    assert tied["blocks.1.mlp.fc1.weight"] == "blocks.0.mlp.fc1.weight"
    again = refused(capsys, "convert", run_folder, tmp_path / "model.safetensors")
    assert "model.safetensors: already exists; choose another name" in again


def test_a_model_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains with loss=bce only; the default loss must not keep it from being exported."""
    config = load_config(None, [*TINY, "model.num_classes=1", "loss.name=bce"])
    parameters = dict(build_model(config.model, config.reduction, seed=1).named_parameters())
    weights = {name: parameter.detach().flatten() for name, parameter in parameters.items()}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    write_checkpoint(DeepSpeedCheckpoint(7, shapes, weights, {}, {}), tmp_path / "run", config)
    call(capsys, "convert", tmp_path / "run", tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["head.weight"].shape == (1, 36)


def test_the_ema(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = list_checkpoints(run_folder / "checkpoints")
    record = read_record(checkpoint)
    tensors = {name: tensor for name, tensor in read_alone(checkpoint).items() if name.startswith("weights.")}
    averages = {name.replace("weights.", "ema.", 1): tensor + 1 for name, tensor in tensors.items()}
    slices = {
        name: TensorSlice(tensor, 0, torch.Size(record["tensors"][name.partition(".")[2]]))
        for name, tensor in (tensors | averages).items()
    }
    one_rank = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
    Saver(tmp_path / "run", one_rank, CheckpointConfig()).write(7, slices, {**record, "parts": ["ema", "weights"]})
    for target, options in (("own", []), ("ema", ["--ema"])):
        call(capsys, "convert", tmp_path / "run", tmp_path / f"{target}.safetensors", *options)
    own, ema = (load_file(tmp_path / f"{target}.safetensors") for target in ("own", "ema"))
    assert own.keys() == ema.keys() == record["tensors"].keys()
    for name, tensor in own.items():
        assert torch.equal(ema[name], tensor + 1), name


def test_which_targets_are_weights_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is a name without suffix, one that ends with a slash, or one that exists."""
    message = refused(capsys, "convert", tmp_path, tmp_path / "x.onnx")
    assert "`convert` writes .safetensors files and folders: use `scalevit export` for other forms" in message
    (tmp_path / "lr0.1").mkdir()
    assert f"{tmp_path}/lr0.1: already exists" in refused(capsys, "convert", tmp_path, tmp_path / "lr0.1")
    for folder in (f"{tmp_path}/lr0.5/", tmp_path / "run"):
        assert "contains no checkpoint" in refused(capsys, "convert", tmp_path, folder, "--stage", 1)


def test_to_deepspeed_and_back(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once: DeepSpeed keeps the first process group of a process. Its other stages are read in test_resume_anywhere."""
    call(capsys, "convert", run_folder, tmp_path / "native", "--stage", 1)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(load_config(None, TINY).model_dump(mode="json")))
    options = ["--config", config, "--stage", 2]
    assert "--stage applies only to" in refused(capsys, "convert", tmp_path / "native", tmp_path / "again", *options)
    printed = call(capsys, "convert", tmp_path / "native", tmp_path / "again", "--config", config)
    assert f"output_dir={tmp_path} name=again" in printed
    (before,), (after,) = (list_checkpoints(folder / "checkpoints") for folder in (run_folder, tmp_path / "again"))
    assert after.name == before.name
    expected = read_alone(before)
    for name, tensor in read_alone(after).items():
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected


class Attack:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_deepspeeds_form_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, trace = tmp_path / "native", tmp_path / "trace"
    folder.mkdir()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(load_config(None, TINY).model_dump(mode="json")))
    zipped = io.BytesIO()
    torch.save({"module": Attack(trace)}, zipped)
    for content in (zipped.getvalue(), pickle.dumps(Attack(trace))):
        (folder / "mp_rank_00_model_states.pt").write_bytes(content)
        message = refused(capsys, "convert", folder, tmp_path / "run", "--config", config)
        assert "contains more than tensors and was not loaded" in message
        assert not trace.exists()
    (folder / "mp_rank_00_model_states.pt").write_bytes(zipped.getvalue()[:100])
    assert str(folder) in refused(capsys, "convert", folder, tmp_path / "run", "--config", config)
    assert not (tmp_path / "run").exists()


def test_refusals(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "convert", tmp_path / "nowhere", tmp_path / "x")
    assert "contains no checkpoint" in refused(capsys, "inspect", tmp_path)
    assert "contains no EMA weights" in refused(capsys, "convert", run_folder, tmp_path / "x.safetensors", "--ema")
    assert "no such folder" in refused(capsys, "convert", run_folder, tmp_path / "no" / "x.safetensors")
    assert "already exists" in refused(capsys, "convert", run_folder, tmp_path)
    assert "--config applies only to" in refused(capsys, "convert", run_folder, tmp_path / "x", "--config", "x.json")
    assert "seed=3: settings apply only to" in refused(capsys, "convert", run_folder, tmp_path / "x", "seed=3")
    damaged = tmp_path / "damaged"
    (checkpoint,) = list_checkpoints(run_folder / "checkpoints")
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-1])
    assert "bytes instead of" in refused(capsys, "convert", damaged, tmp_path / "x.safetensors")
    assert "bytes instead of" in refused(capsys, "inspect", damaged)
