"""One optimizer step: its micro-batches, their losses and gradients, the update and the EMA."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.profiler import record_function

from scalevit.data.faults import Fault
from scalevit.data.loading.base import Batch
from scalevit.data.transforms.mixing import BatchMixing
from scalevit.engines.base import Engine, StepResult
from scalevit.errors import UserError
from scalevit.randomness import seed_micro_batch
from scalevit.training.ema import Ema
from scalevit.training.setting_keys import naming_data_settings
from scalevit.training.tasks.base import DeviceBatch, TaskRunner

# A run with this many steps in a row without a finite gradient does not recover.
_SKIPPED_STEPS_LIMIT = 50


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as this rank saw it."""

    losses: dict[str, Tensor]
    """Scalars on the device, means over this rank's micro-batches: "loss", and "loss_NAME" for the parts of it that
    the task names."""
    result: StepResult
    seconds: float
    faults: list[Fault]
    """Bad samples among the step's data."""


class TrainingStep:
    """Takes the optimizer steps of a run."""

    def __init__(
        self,
        engine: Engine,
        task: TaskRunner,
        ema: Ema | None,
        *,
        transform: Callable[[Tensor], Tensor],
        mixing: BatchMixing,
        accumulation: int,
        seed: int,
        channels_last: bool,
    ):
        """
        Args:
            engine: holds the weights and the optimizer.
            task: makes a loss of a micro-batch.
            ema: follows the weights, if there is one.
            transform: of images (m, 3, S, S) on the device: normalisation and erasing.
            mixing: of images and labels.
            accumulation: micro-batches of this rank in a step.
            seed: of what is drawn for each micro-batch on the device.
            channels_last: memory format of the images.
        """
        self._engine, self._task, self._ema = engine, task, ema
        self._transform, self._mixing = transform, mixing
        self._accumulation, self._seed = accumulation, seed
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, micro_batches: Iterator[Batch], *, step: int, lr: float) -> StepReport:
        """One optimizer step. Collective.

        Args:
            micro_batches: `accumulation` of them are taken.
            step: number of the step, from 0, for which the loader made them.
            lr: learning rate.

        Raises:
            UserError: the data cannot be read; on every rank.
        """
        started = time.perf_counter()
        engine = self._engine
        # All of the step's data first: a rank whose data fails must say so before its peers wait for its gradients.
        with record_function("data wait"), engine.world.collective_errors(), naming_data_settings():
            batches = list(islice(micro_batches, self._accumulation))
        losses: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            assert batch.step == step, f"the loader is at step {batch.step}, the run at {step}"
            for name, loss in self._forward_backward(batch, last=index == self._accumulation - 1).items():
                part = loss / self._accumulation
                losses[name] = losses[name] + part if name in losses else part
        with record_function("optimizer step"):
            result = engine.step(lr)
        if self._ema is not None and not result.skipped:
            with record_function("EMA"):
                self._ema.update(engine.local_parameters())
        faults = [fault for batch in batches for fault in batch.faults]
        return StepReport(losses, result, time.perf_counter() - started, faults)

    def _forward_backward(self, batch: Batch, *, last: bool) -> dict[str, Tensor]:
        """The losses of a micro-batch, summed over the task's passes; its gradient is added to the engine's."""
        seed_micro_batch(self._seed, batch.step, batch.micro_batch)
        on_device = self._to_device(batch)
        losses: dict[str, Tensor] = {}
        for index in range(self._task.passes):
            with record_function("forward"):
                loss = self._task.loss(self._engine.forward, on_device, index)
            with record_function("backward"):
                self._engine.backward(loss.total, last=last and index == self._task.passes - 1)
            named = {"loss": loss.total, **{f"loss_{name}": part for name, part in loss.parts.items()}}
            for name, value in named.items():
                losses[name] = losses[name] + value.detach() if name in losses else value.detach()
        return losses

    def _to_device(self, batch: Batch) -> DeviceBatch:
        device = self._engine.world.device
        images = batch.images.to(device, non_blocking=True).contiguous(memory_format=self._layout)
        labels = batch.labels.to(device, non_blocking=True)
        return DeviceBatch(*self._mixing(self._transform(images), labels))


class DivergenceCheck:
    """Ends a run whose gradients are not finite any more."""

    def __init__(self) -> None:
        self._skipped_in_a_row = 0

    def add(self, result: StepResult, *, step: int) -> None:
        """One step, the same on every rank.

        Args:
            result: of the step.
            step: optimizer steps done.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if self._skipped_in_a_row == _SKIPPED_STEPS_LIMIT:
            raise UserError(
                f"training diverged: no finite gradient in {_SKIPPED_STEPS_LIMIT} steps up to step {step}; "
                "lower optimizer.lr, set optimizer.clip_grad_norm, or use train.precision=bf16"
            )
