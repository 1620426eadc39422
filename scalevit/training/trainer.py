"""The training loop: steps, evaluation, EMA, checkpoints, metrics. Knows every room through its small interface.

A run's randomness has no state. The loader's pixels follow from (seed, position), and mixing, drop-path and dropout
from (seed, step, micro-batch), so a run gives the same numbers at any world size and after any interruption.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from torch.profiler import record_function

from scalevit.checkpoint.folder import list_resumable, read_record
from scalevit.checkpoint.restore import newest_whole, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver
from scalevit.config.tree import Config
from scalevit.data.faults import Fault, FaultLog
from scalevit.data.loading.base import Batch
from scalevit.data.loading.train_loader import check_fingerprint
from scalevit.distributed import World
from scalevit.engines.base import Engine, StepResult
from scalevit.errors import UserError
from scalevit.models.costs import ModelCosts
from scalevit.models.weights.write import write_weights
from scalevit.runs.folder import RunFolder, describe_environment
from scalevit.runs.summary import best_epoch, describe_accuracies, summarise
from scalevit.terminal import ProgressBar
from scalevit.training.ema import Ema
from scalevit.training.evaluation import evaluate
from scalevit.training.preemption import Stopped, StopSignal
from scalevit.training.profiling import Profiler
from scalevit.training.run import DATA_KEYS, Data, naming_data_settings
from scalevit.training.schedules import Schedule
from scalevit.training.throughput import Throughput, peak_flops
from scalevit.tying import uses_per_parameter

# This many steps in a row without a finite gradient, and the run is lost rather than unlucky.
_SKIPPED_STEPS_LIMIT = 50


class Trainer:
    """One run, from its newest checkpoint (or the start) to its end (or a signal to stop)."""

    def __init__(self, config: Config, world: World, engine: Engine, data: Data, run: RunFolder, costs: ModelCosts):
        self.costs = costs
        self.config, self.world, self.engine, self.data, self.run = config, world, engine, data, run
        train = config.train
        self.total_steps = min(data.train.steps_in(train.epochs), train.max_steps or math.inf)
        self.schedule = Schedule(config.schedule, config.optimizer.lr, train.epochs)
        self.ema: Ema | None = None
        if config.ema.enabled:
            repeated = config.ema.shared_parameters == "per_use"
            updates = uses_per_parameter(engine.module) if repeated else None
            self.ema = Ema(engine.local_parameters(), config.ema.decay, updates)
        peak = peak_flops(world.device, train.precision)
        self.throughput = Throughput(costs.training_flops, peak * world.size if peak else None)
        self.state = RunState()
        self.saver = Saver(run.checkpoints, world, train.checkpoint)
        self.interval = _Interval(world.device)
        self.lr = math.nan
        self.faults = FaultLog(run.path / "data_faults.jsonl", limit=config.data.max_faults, writes=run.writes)
        self._new_faults: list[Fault] = data.index_faults
        self._skipped_in_a_row = 0

    def fit(self, *, resume_from: Sequence[Path] = ()) -> dict[str, Any]:
        """Trains to the end.

        Args:
            resume_from: checkpoints to go on from, the newest first; damaged ones are passed over.

        Returns:
            The summary, as in summary.json.

        Raises:
            Stopped: a signal asked to stop; a checkpoint was saved.
            UserError: the data, the disk or the numbers do not let it go on.
        """
        try:
            self._open(resume_from)
            self._train()
            return self._finish()
        except (UserError, Stopped):
            # All ranks leave together here: what is still being written is worth the wait.
            self.saver.wait()
            raise

    def _train(self) -> None:
        state, total = self.state, int(self.total_steps)
        micro_batches = self.data.train.batches(state.step)
        first_step = state.step
        with (
            Profiler(self.config.train, self.run.path / "profile", self.world, first_step=first_step) as profiler,
            StopSignal(speaks=self.world.is_first) as stop,
            ProgressBar(self.config.name, total, "steps", done=state.step, visible=self.world.is_first) as counter,
        ):
            self.engine.train()
            while state.step < total:
                epoch = self.data.train.epoch_of(state.step)
                # The first step of a process warms up and waits for its loader: it does not count for the rate.
                with profiler.step(state.step):
                    self._step(micro_batches, timed=state.step > first_step)
                counter.advance(self._note())
                due = self._due(epoch)
                if due.log:
                    self._log_training(epoch)
                if due.evaluate:
                    counter.line(self._evaluate(epoch))
                interrupted = self.world.any(stop.requested or self.saver.failed)
                if interrupted:
                    self.saver.wait()  # raises where that is the reason
                if due.save or interrupted:
                    self._record_faults()
                    self._save_checkpoint()
                if interrupted and state.step < total:
                    self.saver.wait()
                    counter.line(f"stopped after step {state.step}; start again with the same command to go on")
                    self.run.close()
                    stop.leave()
            self.saver.wait()  # here, where a signal does not end it
        if not state.epochs or state.epochs[-1]["step"] != state.step:
            # Stopped by a signal, and then resumed with a train.max_steps that it has passed.
            self._evaluate(self.data.train.epoch_of(state.step - 1))

    def _due(self, epoch: int) -> "_Due":
        """What is to be done after the step that was just taken, in this epoch."""
        config, step = self.config, self.state.step
        epoch_ends = step == self.data.train.epoch_end_step(epoch)
        last = step == self.total_steps

        def every(epochs: int | None, steps: int | None = None) -> bool:
            at_epoch = epochs is not None and epoch_ends and (epoch + 1) % epochs == 0
            return last or at_epoch or (steps is not None and step % steps == 0)

        saving = config.train.checkpoint
        return _Due(
            log=epoch_ends or every(None, config.train.log_every_steps),
            evaluate=every(config.evaluation.every_epochs),
            save=every(saving.every_epochs, saving.every_steps),
        )

    # --- one step -------------------------------------------------------------------------------------------

    def _step(self, micro_batches: Iterator[Batch], *, timed: bool) -> None:
        """One optimizer step with everything that belongs to it."""
        config, accumulation = self.config, self.data.train.accumulation
        started = time.perf_counter()
        self.lr = self.schedule.lr(self._schedule_epoch())
        # All of the step's data first: a rank whose data fails must say so before its peers wait for its gradients.
        with record_function("data wait"), self.world.agreeing_on_errors():
            batches = list(islice(micro_batches, accumulation))
        loss = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(batches):
            self._new_faults += batch.faults
            assert batch.step == self.state.step, f"the loader is at step {batch.step}, the run at {self.state.step}"
            last = index == accumulation - 1
            loss += self._forward_backward(batch, last=last) / accumulation
        with record_function("optimizer step"):
            outcome = self.engine.step(self.lr)
        self.state.step += 1
        if self.ema is not None and not outcome.skipped:
            with record_function("EMA"):
                self.ema.update(self.engine.local_parameters())
        seconds = time.perf_counter() - started
        self.interval.add(loss, outcome, seconds)
        if timed:
            self.throughput.add(config.train.global_batch, seconds)
        self._check_divergence(outcome)

    def _forward_backward(self, batch: Batch, *, last: bool) -> torch.Tensor:
        """Returns the micro-batch's mean loss, on the device."""
        seed_micro_batch(self.config.seed, batch.step, batch.micro_batch)
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        images = batch.images.to(self.world.device, non_blocking=True).contiguous(memory_format=layout)
        labels = batch.labels.to(self.world.device, non_blocking=True)
        images, mixed = self.data.mix(self.data.train.finish(images), labels)
        smoothing: float = self.config.loss.label_smoothing  # type: ignore[attr-defined]
        targets = mixup_target(mixed.labels, self.config.model.num_classes, mixed.weight, smoothing)
        with record_function("forward"):
            loss = F.cross_entropy(self.engine(images).float(), targets)
        with record_function("backward"):
            self.engine.backward(loss, last=last)
        return loss.detach()

    def _check_divergence(self, outcome: StepResult) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if outcome.skipped else 0
        if self._skipped_in_a_row == _SKIPPED_STEPS_LIMIT:
            raise UserError(
                f"training diverged: no finite gradient in {_SKIPPED_STEPS_LIMIT} steps up to step {self.state.step}; "
                "lower optimizer.lr, set optimizer.clip_grad_norm, or use train.precision=bf16"
            )

    def _note(self) -> str:
        rate = self.throughput.images_per_second
        shown = f", {rate:,.4g} images/s" if rate else ""
        return f"loss {self.interval.shown_loss:.4f}, lr {self.lr:.2e}{shown}"

    def _schedule_epoch(self) -> float:
        """Where the schedule stands: at the epoch's start, or moving with every step."""
        step, train = self.state.step, self.data.train
        if self.config.schedule.update == "epoch":
            return train.epoch_of(step)
        epochs = self.config.train.epochs
        return step * epochs / train.steps_in(epochs)

    # --- between steps --------------------------------------------------------------------------------------

    def _log_training(self, epoch: int) -> None:
        interval = self.interval
        self._record_faults()
        self.run.log(
            {
                "kind": "train",
                "step": self.state.step,
                "epoch": epoch + 1,
                "loss": interval.mean_loss(self.world),
                "lr": self.lr,
                "grad_norm": interval.grad_norm,
                "skipped": interval.skipped,
                "loss_scale": self.engine.loss_scale.value,
                "images_per_second": interval.steps * self.config.train.global_batch / interval.seconds,
                "mfu": self.throughput.mfu,
                "data_faults": self.faults.count,
            }
        )
        interval.reset()

    def _evaluate(self, epoch: int) -> str:
        """Evaluates weights and EMA, records both, keeps the best; returns a line for a person."""
        layout = self.config.train.channels_last
        record: dict[str, Any] = {"kind": "evaluation", "step": self.state.step, "epoch": epoch + 1}
        faults = self._new_faults
        results = {"": evaluate(self.engine, self.data.evaluation, channels_last=layout, faults=faults)}
        if self.ema is not None:
            with self.engine.using(self.ema.tensors):
                results["ema_"] = evaluate(self.engine, self.data.evaluation, channels_last=layout, faults=faults)
        self._record_faults()
        for prefix, accuracy in results.items():
            record |= {f"{prefix}{key}": value for key, value in vars(accuracy).items()}
        # A run that goes on after a train.max_steps evaluates the epoch in which it stopped a second time.
        self.state.epochs = [earlier for earlier in self.state.epochs if earlier["epoch"] != epoch + 1]
        self.state.epochs.append(record)
        self.run.log(record)
        for prefix in results:
            if record is best_epoch(self.state.epochs, prefix):
                self._save_weights(f"best_{prefix}".rstrip("_"), averaged=prefix == "ema_")
        return f"epoch {epoch + 1}: {describe_accuracies(results)}"

    def _record_faults(self) -> None:
        """Collective: lists the bad samples that any rank met, and stops the run beyond data.max_faults."""
        faults, self._new_faults = self.world.gather(self._new_faults), []
        with self.world.agreeing_on_errors(), naming_data_settings():
            self.faults.add(faults, step=self.state.step)

    def _save_weights(self, name: str, *, averaged: bool) -> None:
        """Collective: `NAME.safetensors` in the run folder, for use elsewhere."""
        assert self.ema is not None or not averaged
        local = self.ema.tensors if averaged and self.ema is not None else self.engine.local_parameters()
        full = self.engine.gather(local)
        with self.world.agreeing_on_errors():
            if self.world.is_first:
                write_weights(
                    self.run.path / f"{name}.safetensors",
                    full,
                    model=self.config.model,
                    reduction=self.config.reduction,
                    tied=self.engine.tied,
                )

    def _save_checkpoint(self) -> None:
        self.state.seconds, self.state.timed_images = self.throughput.seconds, self.throughput.images
        about = {"config": self.config.model_dump(mode="json"), "data": self.data.train.fingerprint}
        evaluated = self.state.epochs[-1] if self.state.epochs else {"step": None}
        score = evaluated.get("ema_top1", evaluated["top1"]) if evaluated["step"] == self.state.step else None
        self.saver.save(self.engine, self.ema, self.state, about, score)

    def _open(self, resume_from: Sequence[Path]) -> None:
        """Takes over a checkpoint's state and opens the run folder."""
        names = ", ".join(checkpoint.name for checkpoint in resume_from)
        self.world.agree_on("what can be resumed from", names or None)
        if resume_from:
            checkpoint = newest_whole(resume_from, self.world)
            found = read_record(checkpoint)["data"]
            if found is not None:  # a run of another program's: its order is not ours anyway
                with self.world.agreeing_on_errors():
                    check_fingerprint(found, self.data.train.fingerprint, f"checkpoint {checkpoint}", DATA_KEYS)
            self.state = restore(checkpoint, self.engine, self.ema)
            self.throughput.add(self.state.timed_images, self.state.seconds)
            if self.world.is_first:
                print(f"resuming {self.run.path} at step {self.state.step}", flush=True)
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        environment = describe_environment(self.world.size, name)
        with self.world.agreeing_on_errors():  # only the first rank writes, but all must leave if it cannot
            self.state.wandb_id = self.run.open(environment, step=self.state.step, wandb_id=self.state.wandb_id)
        self._record_faults()

    def _finish(self) -> dict[str, Any]:
        self.saver.wait()
        self._save_weights("final", averaged=False)
        if self.ema is not None:
            self._save_weights("final_ema", averaged=True)
        summary = {
            "name": self.config.name,
            **summarise(self.state.epochs, ""),
            "ema": summarise(self.state.epochs, "ema_") if self.ema is not None else None,
            "images_per_second": self.throughput.images_per_second,
            "mfu": self.throughput.mfu,
            "steps": self.state.step,
            "data_faults": self.faults.count,
            "epochs": self.config.train.epochs,
            "parameters": self.costs.parameters,
            "mlp_parameters": self.costs.mlp_parameters,
            "gmacs": self.costs.macs / 1e9,
            "reduction": self.config.reduction.strategy,
            "engine": self.config.engine.model_dump(mode="json"),
            "precision": self.config.train.precision,
            "world_size": self.world.size,
            "seed": self.config.seed,
        }
        self.run.finish(summary)
        return summary


@dataclass(frozen=True)
class _Due:
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool


class _Interval:
    """Sums since the last line of metrics."""

    def __init__(self, device: torch.device):
        self._device = device
        self.shown_loss = math.nan
        self.reset()

    def reset(self) -> None:
        self._loss = torch.zeros((), device=self._device)
        self.steps, self.seconds, self.skipped, self.grad_norm = 0, 0.0, 0, math.nan

    def add(self, loss: torch.Tensor, outcome: StepResult, seconds: float) -> None:
        """One step; `loss` is this rank's."""
        self._loss += loss
        self.steps += 1
        self.seconds += seconds
        self.skipped += outcome.skipped
        self.grad_norm = outcome.grad_norm
        if self._device.type == "cpu":  # on a GPU reading it would wait for the step
            self.shown_loss = loss.item()

    def mean_loss(self, world: World) -> float:
        """Over ranks and steps. Collective."""
        self.shown_loss = (world.all_reduce_sum(self._loss.clone()) / (world.size * self.steps)).item()
        return self.shown_loss


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seeds what is drawn during one micro-batch's forward: mixing (numpy), drop-path and dropout (torch)."""
    words = np.random.SeedSequence([seed, step, micro_batch]).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] & np.uint64(0xFFFFFFFF)))


def find_resumable(config: Config, run: RunFolder) -> list[Path]:
    """The checkpoints to go on from, the newest first; [] to start anew. Reads no tensors.

    Raises:
        UserError: `train.resume` does not fit what is there, or the checkpoints are of another model.
    """
    found = list_resumable(run.checkpoints)
    wish = config.train.resume
    if not found:
        if wish is True:
            raise UserError(f"train.resume = true, but {run.checkpoints} holds no checkpoint")
        return []
    if wish is False:
        raise UserError(
            f"train.resume = false, but {run.path} holds the checkpoints of a run: choose another name, or remove it"
        )
    before = _newest_config(found)
    now = config.model_dump(mode="json")
    for section, ignored in (("model", {"initial_weights", "drop_path"}), ("reduction", set()), ("seed", set())):
        if before is not None and _without(before[section], ignored) != _without(now[section], ignored):
            raise UserError(
                f"run folder {run.path}: was made with another {section} ({before[section]}): choose another name, "
                "or remove it"
            )
    return found


def _newest_config(checkpoints: Sequence[Path]) -> dict[str, Any] | None:
    """The config of the newest checkpoint whose record can be read; damage is dealt with when the run starts."""
    for checkpoint in checkpoints:
        try:
            return read_record(checkpoint)["config"]
        except UserError:
            continue
    return None


def _without(value: Any, keys: set[str]) -> Any:
    return {k: v for k, v in value.items() if k not in keys} if isinstance(value, dict) else value
