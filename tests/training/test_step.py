"""One optimizer step around a stub engine: what is summed, in which order, and when a run has diverged."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scalevit.data.faults import Fault
from scalevit.data.loading.base import Batch
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.distributed import World
from scalevit.engines.base import StepResult
from scalevit.errors import UserError
from scalevit.training.losses.cross_entropy import CrossEntropyLoss
from scalevit.training.step import DivergenceCheck, TrainingStep
from scalevit.training.tasks.base import DeviceBatch, Forward, TaskLoss
from scalevit.training.tasks.classification import ClassificationTask

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
FAULT = Fault("a.tar", "k", 0, "broken")


class StubEngine:
    """A linear model; notes every backward pass and step."""

    def __init__(self, *, skipped: bool = False):
        self.world = ALONE
        self.model = torch.nn.Linear(3 * 2 * 2, 5)
        self.calls: list[Any] = []
        self._skipped = skipped

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.flatten(1))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        self.calls.append(("backward", last))

    def step(self, lr: float) -> StepResult:
        self.calls.append(("step", lr))
        return StepResult(1.0, self._skipped)

    def local_parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


class TwoPassTask:
    """A runner of two passes with named parts, as width-nested training has them."""

    passes = 2

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        loss = forward(batch.images).mean() * 0 + 1.0 + index
        return TaskLoss(loss, {"second": loss} if index else {"first": loss})


def batches(count: int, step: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(4, 3, 2, 2, generator=generator),
            torch.arange(4),
            step,
            number,
            [FAULT] if number else [],
        )
        for number in range(count)
    ]


def training_step(engine: StubEngine, task: Any, ema: Any = None, accumulation: int = 2) -> TrainingStep:
    return TrainingStep(
        engine,  # type: ignore[arg-type]
        task,
        ema,
        transform=lambda images: images,
        mixing=BatchMixing(mixup=0.0, cutmix=0.0, probability=0.0),
        accumulation=accumulation,
        seed=1,
        channels_last=True,
    )


def test_the_loss_is_the_mean_over_micro_batches_and_the_last_backward_completes_the_step() -> None:
    engine, loss = StubEngine(), CrossEntropyLoss()
    taken = iter(batches(3))
    report = training_step(engine, ClassificationTask().build(loss, ALONE.device))(taken, step=0, lr=0.25)
    assert engine.calls == [("backward", False), ("backward", True), ("step", 0.25)]
    assert next(taken).micro_batch == 2, "only this step's micro-batches are taken"
    expected = []
    for batch in batches(2):
        _, labels = BatchMixing(mixup=0.0, cutmix=0.0, probability=0.0)(batch.images, batch.labels)
        expected.append(loss.mean(engine.forward(batch.images), labels))
    assert report.losses.keys() == {"loss"}
    torch.testing.assert_close(report.losses["loss"], torch.stack(expected).mean().detach())
    assert report.faults == [FAULT]


def test_passes_are_summed_and_named_parts_are_reported() -> None:
    engine = StubEngine()
    report = training_step(engine, TwoPassTask())(iter(batches(2)), step=0, lr=0.1)
    assert [last for name, last in engine.calls if name == "backward"] == [False, False, False, True]
    assert {name: loss.item() for name, loss in report.losses.items()} == {
        "loss": 3.0,
        "loss_first": 1.0,
        "loss_second": 2.0,
    }


@pytest.mark.parametrize("skipped", [False, True])
def test_the_ema_follows_only_steps_that_changed_the_weights(skipped: bool) -> None:
    updates: list[Any] = []
    ema = SimpleNamespace(update=updates.append)
    step = training_step(StubEngine(skipped=skipped), TwoPassTask(), ema)
    step(iter(batches(2)), step=0, lr=0.1)
    assert len(updates) == (0 if skipped else 1)


def test_a_run_diverges_when_fifty_steps_in_a_row_are_skipped() -> None:
    check = DivergenceCheck()
    skipped, taken = StepResult(float("inf"), True), StepResult(1.0, False)
    for step in range(49):
        check.add(skipped, step=step + 1)
    check.add(taken, step=50)
    for step in range(49):
        check.add(skipped, step=step + 51)
    with pytest.raises(UserError, match=r"training diverged: .* up to step 100; lower optimizer\.lr"):
        check.add(skipped, step=100)
