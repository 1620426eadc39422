"""Distillation: timm's losses and gradients, teachers of every origin, one-line errors, and runs that resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from task_runs import ALONE, config, gradients, micro_batch, spread, train, write
from timm.models import save_for_hf
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from torch import nn

from launching import metrics
from scalevit.config.tree import Config
from scalevit.errors import SettingError, UserError
from scalevit.export.checkpoint_model import model_of_checkpoint
from scalevit.models.build import build_model
from scalevit.training.run import prepare
from scalevit.training.tasks.base import DeviceBatch
from scalevit.training.tasks.distillation.runner import DistillationRunner
from scalevit.training.tasks.distillation.teacher import feature_width

# A teacher of another width, patch size and normalisation than the student.
WIDE = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TOKEN = ["model.name=deit_tiny_distilled_patch16_224", "model.kwargs.global_pool=token", "task.method=token"]
BY_NAME = ["task.name=distillation", "task.teacher.name=deit_tiny_patch16_224"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain state dict."""
    path = tmp_path_factory.mktemp("teacher") / "wide.pth"
    torch.save(spread(timm.create_model("deit_tiny_patch16_224", **WIDE)).state_dict(), path)
    return path


def wide(path: Path) -> list[str]:
    kwargs = [f"task.teacher.kwargs.{key}={value}" for key, value in WIDE.items() if key != "num_classes"]
    return [*BY_NAME, f"task.teacher.weights={path}", "model.drop_path=0.0", *kwargs]


def student_and_runner(of: Config) -> tuple[Any, DistillationRunner]:
    model = spread(build_model(of.model, of.reduction, seed=1))
    runner = of.task.build(of, ALONE)
    assert isinstance(runner, DistillationRunner)
    runner.extend(model)
    runner.start(model)
    return model.train(), runner


class SoftenedCrossEntropy(nn.Module):
    """The run's loss of mixed labels, as timm's tasks call a criterion."""

    def __init__(self, of: Config, batch: DeviceBatch):
        super().__init__()
        self._of, self._batch = of, batch

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._of.loss(logits, self._batch.labels).mean()


CASES: dict[str, tuple[list[str], Any, dict[str, Any]]] = {
    "logits": (["task.temperature=3.0"], LogitDistillationTask, {"temperature": 3.0}),
    "soft token": ([*TOKEN, "task.temperature=2.0"], TokenDistillationTask, {"temperature": 2.0}),
    "hard token": ([*TOKEN, "task.hard_targets=true"], TokenDistillationTask, {"distill_type": "hard"}),
    "features": (["task.method=features"], FeatureDistillationTask, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_timms(case: str, teacher_file: Path) -> None:
    settings, timms, arguments = CASES[case]
    of = config(*wide(teacher_file), *settings, "task.label_weight=0.4", "task.distillation_weight=1.7", "seed=9")
    model, runner = student_and_runner(of)
    batch = micro_batch()
    ours = runner.loss(model, batch, 0)
    own = gradients(ours.total / 5, model)

    other = spread(build_model(of.model, of.reduction, seed=1)).train()
    other.pretrained_cfg = INCEPTION if case in ("logits", "features") else IMAGENET  # the student's, by its name
    teacher = timm.create_model("deit_tiny_patch16_224", **WIDE)
    teacher.load_state_dict(torch.load(teacher_file))
    weights = {"task_loss_weight": 0.4, "distill_loss_weight": 1.7, "verbose": False}
    task = timms(other, teacher.requires_grad_(False), SoftenedCrossEntropy(of, batch), **arguments, **weights).train()
    if case == "features":
        task.trainable_module.projection.load_state_dict(model.task.projection.state_dict())
    expected = task(batch.images, batch.labels.labels)
    theirs = gradients(expected["loss"], task.trainable_module)

    torch.testing.assert_close(ours.total / 5, expected["loss"])
    distance = expected["kd_loss"] if "kd_loss" in expected else expected["distill_loss"]
    torch.testing.assert_close(ours.parts["distillation"] / 5, distance)
    if "token" in case:
        heads = model(batch.images)
        torch.testing.assert_close(model.eval()(batch.images), sum(heads) / 2, msg="an evaluation averages both heads")
    renamed = {name.replace("student.", "").replace("projection.", "task.projection."): g for name, g in theirs.items()}
    assert own.keys() == renamed.keys()
    for name, gradient in own.items():
        # fp32 rounds at 6e-8; the order of summation differs.
        assert (gradient - renamed[name]).norm() <= 1e-5 * renamed[name].norm(), name


def test_cosine_distance_and_rows_that_fill_up(teacher_file: Path) -> None:
    of = config(*wide(teacher_file), "task.method=features", "task.feature_loss=cosine")
    model, runner = student_and_runner(of)
    batch = micro_batch(padding=2)
    ours = runner.loss(model, batch, 0)
    taught = timm.create_model("deit_tiny_patch16_224", **WIDE)
    taught.load_state_dict(torch.load(teacher_file))
    pixels = batch.images * 0.5 + 0.5
    mean, std = (torch.tensor(IMAGENET[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    tokens = taught.eval().forward_features((pixels - mean) / std)
    logits, features = model(batch.images)
    distances = 1 - F.cosine_similarity(features, taught.forward_head(tokens, pre_logits=True), dim=1)
    torch.testing.assert_close(ours.parts["distillation"], distances[:3].sum())
    torch.testing.assert_close(ours.parts["labels"], of.loss(logits, batch.labels)[:3].sum())
    assert torch.equal(model.eval()(batch.images), model.forward_head(model.forward_features(batch.images)))


def test_micro_batches_add_up(teacher_file: Path) -> None:
    model, runner = student_and_runner(config(*wide(teacher_file), "task.temperature=2.0"))
    batch = micro_batch(6)
    whole = runner.loss(model, batch, 0).total
    parts = []
    for part in (slice(0, 2), slice(2, 6)):
        labels = type(batch.labels)(*(each[part] for each in batch.labels[:3]))
        parts.append(runner.loss(model, DeviceBatch(batch.images[part], labels, batch.weights[part], 3), 0).total)
    torch.testing.assert_close(sum(parts), whole)


# --- teachers ---------------------------------------------------------------------------------------------


def runner_of(*settings: str) -> DistillationRunner:
    of = config("task.name=distillation", *settings)
    of.task.check()
    runner = of.task.build(of, ALONE)
    assert isinstance(runner, DistillationRunner)
    return runner


def test_the_model_of_our_file_is_read_from_it(tmp_path: Path) -> None:
    """Grouped and unreduced, by the digest of what they compute: also as a plain file with a name."""
    digests = []
    for strategy in ("none", "grouped"):
        of = config(f"reduction.strategy={strategy}", "model.kwargs.depth=4")
        model = build_model(of.model, of.reduction, seed=3)
        path = write(tmp_path / f"{strategy}.safetensors", model, of)
        digests.append(runner_of(f"task.teacher.weights={path}").fingerprint["teacher.digest"])
        if strategy == "none":
            torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.pth")
    kwargs = [f"task.teacher.kwargs.{k}={v}" for k, v in {**of.model.kwargs, "img_size": 16}.items()]
    named = ["task.teacher.name=vit_tiny_patch16_224", f"task.teacher.weights={tmp_path}/plain.pth", *kwargs]
    digests.append(runner_of(*named).fingerprint["teacher.digest"])
    assert digests[0] == digests[2] != digests[1]


def test_a_folder_of_the_hugging_face_form_teaches(tmp_path: Path) -> None:
    """With the normalisation that it states; one whose classifier does not fit its description is refused."""
    model = spread(timm.create_model("deit_tiny_patch16_224", **WIDE))
    save_for_hf(model, str(tmp_path / "x"), model_config={}, model_args=WIDE, safe_serialization=True)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.25, 0.5, 0.75]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    teacher: Any = runner_of(f"task.teacher.weights={tmp_path}/x")._teacher
    for name, tensor in model.state_dict().items():
        assert torch.equal(teacher.module.state_dict()[name], tensor), name
    assert teacher.mean == (0.25, 0.5, 0.75)
    config["num_classes"] = 12
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="its weights have 12 classes, but it is built with 10"):
        runner_of(f"task.teacher.weights={tmp_path}/x", "model.num_classes=12")


def test_another_image_size_resamples_the_teachers_position_embeddings(tmp_path: Path) -> None:
    of = config("reduction.strategy=none", "model.image_size=32")
    path = write(tmp_path / "large.safetensors", build_model(of.model, of.reduction, seed=3), of)
    teacher: Any = runner_of(f"task.teacher.weights={path}")._teacher
    assert teacher.module.pos_embed.shape[1] == (16 // 4) ** 2 + 1


def test_a_convolutional_teacher_is_sharded_by_its_parts_and_has_features() -> None:
    runner: Any = runner_of("task.teacher.name=resnet10t", "task.teacher.pretrained=false", "task.method=features")
    teacher = runner._teacher
    units = {id(parameter) for unit in teacher.units for parameter in unit.parameters()}
    left = [name for name, parameter in teacher.module.named_parameters() if id(parameter) not in units]
    assert all(name.startswith(("bn1.", "fc.")) for name in left)
    assert feature_width(teacher.module) == 512


TINY_TEACHER = ["task.teacher.name=test_byobnet", "task.teacher.pretrained=false"]
SHALLOWER = [f"task.teacher.kwargs.{key}={value}" for key, value in {**WIDE, "img_size": 16}.items()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "config: task.teacher.name = null: name a model of timm, or a file in task.teacher.weights"),
        (["task.teacher.name=vit_tinny_patch16_224"], 'config: task.teacher.name = "vit_tinny_patch16_224": is not a '),
        (["task.teacher.weights=none.pth"], 'config: task.teacher.weights = "none.pth": no such file'),
        (
            ["task.teacher.weights=folder"],
            'config: task.teacher.weights = "folder": a folder without a config.json of timm, which names the archi'
            "tecture: name a file, e.g. folder/best.safetensors",
        ),
        (
            ["task.teacher.weights=teacher.onnx"],
            'config: task.teacher.weights = "teacher.onnx": is an export (--to onnx): name the run or its weights',
        ),
        (
            ["task.teacher.weights=hf-hub:someone/model"],
            'config: task.teacher.weights = "hf-hub:someone/model": is an address: name it in task.teacher.name',
        ),
        (["task.teacher.weights=plain.pth"], 'config: task.teacher.weights = "plain.pth": does not say of which model'),
        (["task.teacher.weights=five.safetensors"], 'config: task.teacher = "five.safetensors": has 5 classes, but'),
        (["task.teacher.name=resnet10t"], 'config: task.teacher = "resnet10t": has 1000 classes, but model.num_class'),
        (
            ["task.teacher.name=resnet10t", "task.teacher.kwargs.num_classes=10"],
            'config: task.teacher = "resnet10t": has 1000 classes, but model.num_classes = 10',
        ),
        (
            ["task.teacher.name=resnet10t", "task.teacher.weights=plain.pth", "task.method=features"],
            'config: task.teacher.name = "resnet10t": plain.pth lacks bn1.bias and ',
        ),
        (
            ["task.teacher.name=vit_tiny_patch16_224", "task.teacher.weights=deep.pth", *SHALLOWER],
            'config: task.teacher.name = "vit_tiny_patch16_224": deep.pth has blocks.1.attn.proj.bias and 11 more, '
            "which this model lacks: set task.teacher.kwargs for its model",
        ),
        (
            ["task.teacher.name=resnet10t", "task.teacher.weights=five.safetensors"],
            'config: task.teacher.name = "resnet10t": five.safetensors says of which model it is: leave the name out',
        ),
        (
            ["task.teacher.name=resnet10t", "task.method=features"],
            'config: task.teacher.name = "resnet10t": its pretrained weights cannot be loaded: name a file in task.te',
        ),
        (
            ["task.teacher.name=deit_tiny_patch16_224", "task.teacher.pretrained=false", "task.teacher.kwargs.deep=2"],
            'config: task.teacher.name = "deit_tiny_patch16_224": cannot be built with these arguments (TypeError',
        ),
        (
            [*TINY_TEACHER, "task.method=features", "model.in_chans=1"],
            'config: task.teacher.name = "test_byobnet": cannot take images of 1 x ',
        ),
        (
            ["task.teacher.weights=ten.safetensors", "task.method=token"],
            'config: task.method = "token": needs a model with a distillation token (deit_*_distilled_*), not vit_tiny',
        ),
    ],
)
def test_a_mistake_is_one_line(settings: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        prepare(config("task.name=distillation", *settings))
    assert str(caught.value).startswith(message)
    assert ("task.teacher.kwargs.in_chans=1" in str(caught.value)) == ("model.in_chans=1" in settings)
    assert "\n" not in str(caught.value)
    assert not Path("runs/quickstart").exists()


def test_hard_targets_need_a_token() -> None:
    with pytest.raises(UserError, match='hard_targets = true needs method = "token", not "logits"'):
        config("task.name=distillation", "task.hard_targets=true")


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A folder with the digits and teachers."""
    folder = tmp_path_factory.mktemp("distilled")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    for name, classes in (("five", 5), ("ten", 10)):
        of = config(f"model.num_classes={classes}", "model.kwargs.embed_dim=24", "reduction.strategy=none")
        write(folder / f"{name}.safetensors", build_model(of.model, of.reduction, seed=3), of)
    torch.save({"weight": torch.zeros(2)}, folder / "plain.pth")
    deep = timm.create_model("vit_tiny_patch16_224", **{**WIDE, "depth": 2})
    torch.save(deep.state_dict(), folder / "deep.pth")
    (folder / "teacher.onnx").touch()
    (folder / "folder").mkdir()
    (folder / "folder" / "best.safetensors").touch()
    return folder


@pytest.fixture
def place(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


FEATURES = ["task.name=distillation", "task.method=features", "task.teacher.weights=ten.safetensors"]


def test_a_run_resumes_bit_for_bit_and_its_files_hold_the_plain_model(place: Path) -> None:
    whole = train("whole", *FEATURES, steps=4)
    train("parts", *FEATURES, steps=2)
    with pytest.raises(UserError, match=r'task\.teacher\.digest: "\w+" -> "\w+"\): undo that'):
        prepare(config(*FEATURES, "name=parts", "task.teacher.weights=five.safetensors"))
    (place / "moved.safetensors").write_bytes((place / "ten.safetensors").read_bytes())  # the same teacher
    parts = train("parts", *FEATURES, "task.teacher.weights=moved.safetensors", steps=4)
    for name in ("final", "final_ema"):
        tensors = load_file(whole / f"{name}.safetensors")
        for key, tensor in load_file(parts / f"{name}.safetensors").items():
            assert torch.equal(tensor, tensors[key]), key
        assert not [key for key in tensors if key.startswith("task.")]
    # The projection is trained and saved.
    saved = {}
    for path in (parts / "checkpoints").glob("step-*/*.safetensors"):
        saved |= {key: value for key, value in load_file(path).items() if "task.projection" in key}
    assert saved
    records = metrics(whole)
    assert {"loss_labels", "loss_distillation"} <= records[0].keys()
    assert records == [{**record, **{k: records[i][k] for k in MEASURED}} for i, record in enumerate(metrics(parts))]
    assert len(metrics(whole, "task")[0]["teacher.digest"]) == 64
    model, _ = model_of_checkpoint(sorted((whole / "checkpoints").glob("step-*"))[-1], ema=False)
    for key, tensor in load_file(whole / "final.safetensors").items():
        assert torch.equal(model.state_dict()[key], tensor), key


MEASURED = ("time", "images_per_second", "data_wait", "peak_memory_bytes")
