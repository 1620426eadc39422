"""Twenty steps of configs/paper/*.json equal those of the paper's own code, recorded by tests/support/paper_code.py.

Recorded in fp32: fp16 has other roundings on other processors, and the paper's code scales its loss only on a GPU. Fp16
with loss scaling is compared with timm's objects. Drop-path is off, since its masks are drawn by other generators,
and the batches are given, so that loaders and augmentation are not part of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from task_runs import ALONE, one_thread, training_step
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor

from paper_steps import (
    CLASSES,
    EMA_DECAY,
    EPOCHS,
    MICRO_BATCHES,
    ROWS,
    SIDE,
    SMALL,
    STEPS,
    STRATEGIES,
    WARMUP_EPOCHS,
    WARMUP_LR,
    batches,
    initial_value,
    record,
)
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.data.loading.base import Batch
from scalevit.data.order.batching import Split
from scalevit.data.transforms.mixing import BatchMixing, MixedLabels
from scalevit.models.build import build_model
from scalevit.training.ema import Ema
from scalevit.training.engine_builder import EngineBuilder, check_engine
from scalevit.training.run import prepare, with_model_defaults
from scalevit.training.schedules import Schedule

RECORDED = json.loads(Path(__file__).with_name("paper_20_steps.json").read_text())["strategies"]
SETTINGS = [
    f"model.image_size={SIDE}",
    f"model.num_classes={CLASSES}",
    *(f"model.kwargs.{key}={value}" for key, value in SMALL.items()),
    "model.drop_path=0",
    f"train.epochs={EPOCHS}",
    f"train.global_batch={MICRO_BATCHES * ROWS}",
    f"train.micro_batch={ROWS}",
    "train.precision=fp32",
    f"schedule.warmup_epochs={WARMUP_EPOCHS}",
    f"schedule.warmup_lr={WARMUP_LR}",
    f"ema.decay={EMA_DECAY}",
    "engine.name=fsdp",  # DeepSpeed runs once per process
]
TOLERANCE = 1e-5


class FixedMixing(BatchMixing):
    """The images are mixed already, each with the one that is as far from the end of its micro-batch."""

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, rows: np.ndarray) -> tuple[Tensor, MixedLabels]:
        weight = list(batches(step))[rows[0] // ROWS].weight
        return images, MixedLabels(labels, labels.flip(0), torch.full((ROWS,), weight, dtype=torch.float64))


def loaded() -> Iterator[Batch]:
    for step in range(STEPS):
        for index, (images, labels, _) in enumerate(batches(step)):
            rows = torch.arange(index * ROWS, (index + 1) * ROWS)
            yield Batch(torch.from_numpy(images), torch.from_numpy(labels), step, rows, [])


def small(strategy: str, folder: Path, *settings: str) -> Config:
    """A preset of the paper's at the size of the comparison, with the initial weights before the reduction."""
    config = load_config(f"paper/{strategy}", [*SETTINGS, *settings])
    weights = plain_weights(config, folder / "plain.pth")
    return load_config(config.model_dump(mode="json"), [f"model.initial_weights={weights}"])


def plain_weights(config: Config, path: Path) -> Path:
    """A file with them; thin has no others."""
    ratio = {"mlp_ratio": config.reduction.mlp_ratio} if config.reduction.strategy == "thin" else {}
    model = timm.create_model(config.model.name, num_classes=CLASSES, img_size=SIDE, **SMALL, **ratio)
    named = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    torch.save({name: torch.from_numpy(initial_value(name, shape)) for name, shape in named.items()}, path)
    return path


def run(config: Config, *, loss_scale: float = 1.0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the file has of a strategy, and the whole EMA.

    Args:
        loss_scale: the first.
    """
    losses, lrs = [], []
    split = Split(config.train.global_batch, 1, ROWS)
    with one_thread(), ALONE.process_group():
        engine = EngineBuilder(config, ALONE, check_engine(config, ALONE))(
            micro_batch=split.size, accumulation=split.accumulation
        )
        engine.loss_scale.value = loss_scale
        ema = Ema.from_config(config.ema, engine)
        assert ema is not None
        step = training_step(config, engine, ema, FixedMixing(mixup=0.8, cutmix=1.0), split)
        schedule = Schedule.from_config(config, STEPS / EPOCHS)
        engine.train()
        data = loaded()
        for number in range(STEPS):
            lrs.append(schedule.lr_of_step(number * EPOCHS // STEPS, number * EPOCHS / STEPS))
            losses.append(step(data, step=number, lr=lrs[-1]).losses["loss"].item())
        average = {name: tensor.numpy() for name, tensor in ema.tensors.items()}
    return {"losses": losses, "lr": lrs, "ema": record(average)}, average


def distance(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    """The largest difference of averages."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(np.subtract(ours[name], theirs[name])).max()) for name in ours)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_steps_are_those_of_the_papers_code(strategy: str, tmp_path: Path) -> None:
    theirs, (ours, _) = RECORDED[strategy], run(small(strategy, tmp_path))
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=TOLERANCE)
    assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
    assert distance(ours["ema"], theirs["ema"]) < TOLERANCE


def test_the_switches_matter(tmp_path: Path) -> None:
    """Each alone moves the grouped model's average by far more than the tolerance."""
    theirs = RECORDED["grouped"]["ema"]
    for setting in ("ema.shared_parameters=once", "ema.start=initial", f"reduction.scale={2**-0.5}"):
        assert distance(run(small("grouped", tmp_path, setting))[0]["ema"], theirs) > 5 * TOLERANCE, setting


def timms_in_fp16(config: Config, *, loss_scale: float) -> tuple[int, dict[str, Tensor]]:
    """The steps that timm's objects take, and their EMA, as in the paper's training loop with `--amp`."""
    model = build_model(config.model, config.reduction, seed=config.seed)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=config.optimizer.lr, weight_decay=0.05)
    ema, scaler, criterion = ModelEmaV3(model, decay=EMA_DECAY), NativeScaler("cpu"), SoftTargetCrossEntropy()
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    schedule, taken = Schedule.from_config(config, STEPS / EPOCHS), []
    optimizer.register_step_pre_hook(lambda *_: taken.append(1))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_of_step(step * EPOCHS // STEPS, step * EPOCHS / STEPS)
        for index, (images, labels, weight) in enumerate(batches(step)):
            with torch.autocast("cpu", torch.float16):
                logits = model(torch.from_numpy(images).contiguous(memory_format=torch.channels_last))
            targets = mixup_target(torch.from_numpy(labels), CLASSES, lam=weight, smoothing=0.1)
            loss = criterion(logits.float(), targets) / MICRO_BATCHES  # autocast on a GPU computes it in fp32
            scaler(loss, optimizer, need_update=index == MICRO_BATCHES - 1)
        optimizer.zero_grad()
        ema.update(model, step=step + 1)
    return len(taken), dict(ema.module.named_parameters())


def test_steps_in_fp16_are_timms(tmp_path: Path) -> None:
    """With a loss scale at first that overflows. Not recorded: products in fp16 differ between processors."""
    config, scale = small("grouped", tmp_path, "train.precision=fp16"), 2.0**24
    with one_thread():
        taken, averages = timms_in_fp16(config, loss_scale=scale)
    expected = record({name: tensor.detach().numpy() for name, tensor in averages.items()})
    assert STEPS // 4 < taken < STEPS - 4, "some steps are skipped"
    for setting, close in (("ema.skipped_steps=average", True), ("ema.skipped_steps=ignore", False)):
        _, own = run(small("grouped", tmp_path, "train.precision=fp16", setting), loss_scale=scale)
        assert (distance(record(own), expected) < TOLERANCE) == close, setting


def test_a_preset_runs_whole(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its order of repeats, erasing after mixing and fp16; and leaves torch's precision as it was."""
    monkeypatch.chdir(tmp_path)
    data = [f"data.{part}={digits / part}" for part in ("train", "validation")]
    sizes = ["data.workers=0", "data.augmentation.mixing_group=4", "train.global_batch=16", "evaluation.batch=180"]
    config = with_model_defaults(
        load_config("paper/grouped", [*SETTINGS, *data, *sizes, "train.precision=fp16", "train.max_steps=2"])
    )
    before = torch.get_float32_matmul_precision()
    with one_thread(), prepare(config).trainer() as trainer:
        assert torch.get_float32_matmul_precision() == "high"
        summary = trainer.fit()
    assert torch.get_float32_matmul_precision() == before
    assert (summary.steps, summary.precision) == (2, "fp16")
    assert "400 in 5 epochs of 80.0" in capsys.readouterr().out, "1,280 of 1,437 images, as RepeatAugSampler"
