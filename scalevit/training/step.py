"""One optimizer step: its micro-batches, their losses and gradients, the update and the EMA."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from scalevit.data.faults import Fault
from scalevit.data.loading.base import Batch, OnDevice
from scalevit.data.order.batching import PADDING, Split
from scalevit.data.transforms.mixing import BatchMixing, MixedLabels
from scalevit.engines.base import Engine, StepResult
from scalevit.errors import UserError
from scalevit.models.dropout import RowKeys
from scalevit.randomness import Purpose, row_keys
from scalevit.training.ema import Ema
from scalevit.training.setting_keys import naming_data_settings
from scalevit.training.tasks.base import DeviceBatch, TaskRunner

# A run with this many steps in a row without a finite gradient does not recover.
_SKIPPED_STEPS_LIMIT = 50


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as this rank saw it."""

    losses: dict[str, Tensor]
    """Scalars on the device, this rank's part of the means over the global batch: "loss", and "loss_NAME" for the parts
    of it that the task names. The sum over ranks is the mean."""
    result: StepResult
    seconds: float
    data_seconds: float
    """Of these, waiting for the loader."""
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
        transform: OnDevice,
        mixing: BatchMixing,
        split: Split,
        seed: int,
        channels_last: bool,
    ):
        """
        Args:
            engine: holds the weights and the optimizer.
            task: makes a loss of a micro-batch.
            ema: follows the weights, if there is one.
            transform: of images (m, 3, S, S) and keys of their rows on the device: normalisation and erasing.
            mixing: of images and labels, before or after that.
            split: of the global batch among ranks and micro-batches.
            seed: of what is drawn for each row on the device.
            channels_last: memory format of the images.
        """
        self._engine, self._task, self._ema = engine, task, ema
        self._transform, self._mixing = transform, mixing
        self._split, self._seed = split, seed
        self._row_keys = RowKeys(engine.module)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, batches: Iterator[Batch], *, step: int, lr: float) -> StepReport:
        """One optimizer step. Collective.

        Args:
            batches: the step's are taken.
            step: number of the step, from 0, for which the loader made them.
            lr: learning rate.

        Raises:
            UserError: the data cannot be read; on every rank.
        """
        started = time.perf_counter()
        engine = self._engine
        # All of the step's data first: a rank whose data fails must say so before its peers wait for its gradients.
        with record_function("data wait"), engine.world.collective_errors(), naming_data_settings():
            loaded = list(islice(batches, self._split.loads))
        data_seconds = time.perf_counter() - started
        losses: dict[str, Tensor] = {}
        done = 0
        for batch in loaded:
            assert batch.step == step, f"the loader is at step {batch.step}, the run at {step}"
            for micro_batch, rows in self._micro_batches(batch):
                done += 1
                for name, loss in self._forward_backward(
                    micro_batch, rows, step, last=done == self._split.accumulation
                ).items():
                    losses[name] = losses[name] + loss if name in losses else loss
        with record_function("optimizer step"):
            result = engine.step(lr)
        if self._ema is not None:
            with record_function("EMA"):
                self._ema.update(engine.local_parameters(), step + 1, skipped=result.skipped)
        faults = [fault for batch in loaded for fault in batch.faults]
        return StepReport(losses, result, time.perf_counter() - started, data_seconds, faults)

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[DeviceBatch, np.ndarray]]:
        """The micro-batches in a loaded batch, each with the numbers of its images."""
        device, views = self._engine.world.device, len(batch.images) // len(batch.rows)
        rows = view_numbers(batch.rows.numpy(), views, self._split.global_batch)
        images = batch.images.to(device, non_blocking=True).contiguous(memory_format=self._layout)
        labels = batch.labels.to(device, non_blocking=True).repeat(views)
        weights = ((batch.rows >= 0).float() / views).to(device, non_blocking=True).repeat(views)
        images, mixed = self._augmented(images, labels, batch.step, rows)
        for start in range(0, len(batch.rows), self._split.size):
            part = partial(_rows_of, views=views, part=slice(start, start + self._split.size))
            own = MixedLabels(part(mixed.labels), part(mixed.partners), part(mixed.weight), views)
            numbers = part(torch.from_numpy(rows)).numpy()
            yield DeviceBatch(part(images), own, part(weights), batch.step), numbers

    def _augmented(self, images: Tensor, labels: Tensor, step: int, rows: np.ndarray) -> tuple[Tensor, MixedLabels]:
        """Normalised, erased and mixed."""
        keys = row_keys(self._seed, Purpose.ERASING, step, rows)
        if self._mixing.unnormalised:
            images, mixed = self._mixing(images, labels, step=step, rows=rows)
            return self._transform(images, keys), mixed
        return self._mixing(self._transform(images, keys), labels, step=step, rows=rows)

    def _forward_backward(self, batch: DeviceBatch, rows: np.ndarray, step: int, *, last: bool) -> dict[str, Tensor]:
        """The losses of a micro-batch, summed over the task's passes; its gradient is added to the engine's."""
        self._row_keys.set(self._seed, step, rows, self._engine.world.device)
        losses: dict[str, Tensor] = {}
        for index in range(self._task.passes):
            with record_function("forward"):
                loss = self._task.loss(self._engine.forward, batch, index)
            with record_function("backward"):
                total = loss.total / self._split.global_batch
                self._engine.backward(total, last=last and index == self._task.passes - 1)
            parts = {f"loss_{name}": part / self._split.global_batch for name, part in loss.parts.items()}
            for name, value in {"loss": total, **parts}.items():
                losses[name] = losses[name] + value.detach() if name in losses else value.detach()
        return losses


def view_numbers(rows: np.ndarray, views: int, global_batch: int) -> np.ndarray:
    """Numbers of images, from which all that is drawn for them follows. First views have the numbers of their rows.

    Args:
        rows: (m,) int64, with padding.
        views: of each row.
        global_batch: rows of a step.

    Returns:
        (views * m,) int64: of the first views of all rows, then of the second ones, ...; padding stays padding.
    """
    shifted = rows + global_batch * np.arange(views)[:, None]
    return np.where(rows == PADDING, PADDING, shifted).ravel()


def _rows_of(values: Tensor, *, views: int, part: slice) -> Tensor:
    """All views of a part of the rows. values: (views * m, ...)."""
    return values[part] if views == 1 else values.unflatten(0, (views, -1))[:, part].flatten(0, 1)


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
                "lower optimizer.lr, set optimizer.clip_grad, or use train.precision=bf16"
            )
