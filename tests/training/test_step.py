"""One optimizer step around a stub engine: what is summed, in which order, and when a run has diverged."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalevit.data.faults import Fault
from scalevit.data.loading.base import Batch
from scalevit.data.order.batching import PADDING, Split
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.distributed import World
from scalevit.engines.base import StepResult
from scalevit.errors import UserError
from scalevit.training.losses.cross_entropy import CrossEntropyLoss
from scalevit.training.step import DivergenceCheck, TrainingStep, view_numbers
from scalevit.training.tasks.base import DeviceBatch, Forward, TaskLoss, TaskRunner
from scalevit.training.tasks.classification import ClassificationRunner

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
FAULT = Fault("a.tar", "k", 0, "broken")


class StubEngine:
    """A linear model; notes every backward pass and step."""

    def __init__(self, *, skipped: bool = False):
        self.world = ALONE
        self.model = self.module = torch.nn.Linear(3 * 2 * 2, 5)
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


class TwoPassTask(TaskRunner):
    """A runner of two passes with named parts, as width-nested training has them."""

    passes = 2

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        loss = forward(batch.images).mean() * 0 + (1.0 + index) * batch.weights.sum()
        return TaskLoss(loss, {"second": loss} if index else {"first": loss})


def batches(count: int, step: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(4, 3, 2, 2, generator=generator),
            torch.arange(4),
            step,
            torch.tensor([4 * number, 4 * number + 1, 4 * number + 2, 4 * number + 3]),
            [FAULT] if number else [],
        )
        for number in range(count)
    ]


def training_step(
    engine: StubEngine, task: Any, ema: Any = None, *, accumulation: int = 2, micro_batch: int = 4
) -> TrainingStep:
    return TrainingStep(
        engine,  # type: ignore[arg-type]
        task,
        ema,
        transform=lambda images, keys: images,
        mixing=BatchMixing(mixup=0.0, cutmix=0.0, probability=0.0),
        split=Split(4 * accumulation, 1, micro_batch),
        seed=1,
        channels_last=True,
    )


def no_mixing() -> BatchMixing:
    return BatchMixing(mixup=0.0, cutmix=0.0, probability=0.0)


def expected_loss(engine: StubEngine, kept: slice = slice(None)) -> Tensor:
    """The mean of the losses of the images in two batches."""
    losses = []
    for batch in batches(2):
        _, labels = no_mixing()(batch.images, batch.labels, step=0, rows=batch.rows.numpy())
        losses.append(CrossEntropyLoss()(engine.forward(batch.images), labels).detach())
    return torch.cat(losses)[kept]


def test_the_loss_is_the_mean_over_the_batch_and_the_last_backward_completes_the_step() -> None:
    engine, loss = StubEngine(), CrossEntropyLoss()
    taken = iter(batches(3))
    report = training_step(engine, ClassificationRunner(loss))(taken, step=0, lr=0.25)
    assert engine.calls == [("backward", False), ("backward", True), ("step", 0.25)]
    assert next(taken).rows.tolist() == [8, 9, 10, 11], "only this step's batches are taken"
    assert report.losses.keys() == {"loss"}
    torch.testing.assert_close(report.losses["loss"], expected_loss(engine).mean())
    assert report.faults == [FAULT]


def test_micro_batches_of_one_image_share_a_loaded_pair() -> None:
    engine = StubEngine()
    pairs = [
        Batch(batch.images[part], batch.labels[part], 0, batch.rows[part], [])
        for batch in batches(2)
        for part in (slice(0, 2), slice(2, 4))
    ]
    step = training_step(engine, ClassificationRunner(CrossEntropyLoss()), micro_batch=1)
    report = step(iter(pairs), step=0, lr=0.25)
    assert engine.calls == [*[("backward", False)] * 7, ("backward", True), ("step", 0.25)]
    torch.testing.assert_close(report.losses["loss"], expected_loss(engine).mean())


def test_views_of_a_row_share_its_weight_and_have_draws_of_their_own() -> None:
    """Two views of eight rows, one of them padding: in whole loads and in micro-batches of one row."""

    class Views(ClassificationRunner):
        def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
            assert batch.labels.views == 2
            rows = len(batch.images) // 2
            assert torch.equal(batch.labels.labels[:rows], batch.labels.labels[rows:])
            assert batch.weights.tolist() in ([0.5] * 2 * rows, [0.5, 0.5, 0.5, 0] * 2, [0.0, 0.0])
            return super().loss(forward, batch, index)

    results = []
    for micro_batch in (4, 1):
        loads = [batch._replace(images=torch.cat([batch.images, batch.images + 1])) for batch in batches(2)]
        loads[1] = loads[1]._replace(rows=torch.tensor([4, 5, 6, PADDING]))
        if micro_batch == 1:
            loads = [
                Batch(
                    batch.images.unflatten(0, (2, 4))[:, part].flatten(0, 1),
                    batch.labels[part],
                    0,
                    batch.rows[part],
                    [],
                )
                for batch in loads
                for part in (slice(0, 2), slice(2, 4))
            ]
        engine = StubEngine()
        with torch.no_grad():
            engine.model.weight.fill_(0.1)
        step = TrainingStep(
            engine,  # type: ignore[arg-type]
            Views(CrossEntropyLoss()),
            None,
            transform=lambda images, keys: images,
            mixing=no_mixing(),
            split=Split(7, 1, micro_batch),
            seed=1,
            channels_last=True,
        )
        engine.model.bias.data.copy_(torch.arange(5.0))
        results.append(step(iter(loads), step=0, lr=0.1).losses["loss"])
    torch.testing.assert_close(*results)
    assert view_numbers(np.array([2, 3, PADDING]), 2, 7).tolist() == [2, 3, PADDING, 9, 10, PADDING]


def test_padding_has_neither_loss_nor_gradient() -> None:
    """Seven images in two micro-batches of four rows."""
    engine = StubEngine()
    task = ClassificationRunner(CrossEntropyLoss())
    first, second = batches(2)
    padded = second._replace(rows=torch.tensor([4, 5, 6, PADDING]), labels=torch.tensor([0, 1, 2, 0]))
    step = TrainingStep(
        engine,  # type: ignore[arg-type]
        task,
        None,
        transform=lambda images, keys: images,
        mixing=no_mixing(),
        split=Split(7, 1, 4),
        seed=1,
        channels_last=False,
    )
    report = step(iter([first, padded]), step=0, lr=0.25)
    gradient = engine.model.weight.grad
    assert gradient is not None
    expected = expected_loss(engine, slice(0, 7)).mean()
    torch.testing.assert_close(report.losses["loss"], expected)
    engine.model.zero_grad()
    images = torch.cat([batch.images for batch in batches(2)])[:7]
    _, labels = no_mixing()(images, torch.tensor([0, 1, 2, 3, 0, 1, 2]), step=0, rows=torch.arange(7).numpy())
    CrossEntropyLoss()(engine.forward(images), labels).mean().backward()
    torch.testing.assert_close(gradient, engine.model.weight.grad)


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
def test_the_ema_knows_the_steps_that_did_not_change_the_weights(skipped: bool) -> None:
    updates: list[Any] = []
    ema = SimpleNamespace(update=lambda local, step, *, skipped: updates.append((step, skipped)))
    step = training_step(StubEngine(skipped=skipped), TwoPassTask(), ema)
    step(iter(batches(2)), step=0, lr=0.1)
    assert updates == [(1, skipped)]


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
