"""One run, in the order of its life: start or resume, steps, evaluation, saving, end.

A run's randomness has no state: pixels follow from (seed, position), and mixing, erasing, drop-path and dropout from
(seed, step, row of the global batch). A run therefore gives the same numbers at any world size, with any micro-batch
and after any interruption. Names no Part.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalevit.checkpoint.folder import read_record
from scalevit.checkpoint.restore import newest_intact, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver
from scalevit.config.tree import Config
from scalevit.data.loading.base import Batch
from scalevit.data.loading.train_loader import check_fingerprint
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.errors import UserError
from scalevit.models.costs import ModelCosts
from scalevit.models.weights.coverage import Coverage
from scalevit.runs.folder import RunFolder
from scalevit.runs.records import Record
from scalevit.runs.summary import Summary, best_epoch, record_key
from scalevit.runs.tracking import Tracking
from scalevit.terminal import ProgressBar, format_bytes, format_duration
from scalevit.training.cadence import Cadence
from scalevit.training.ema import Ema
from scalevit.training.evaluation import Evaluation, evaluate_weight_sets
from scalevit.training.interval import Interval
from scalevit.training.open_data import RunData
from scalevit.training.optimizers import state_tensors
from scalevit.training.predictions import PredictionLog
from scalevit.training.preemption import Interrupted, PreemptionHandler
from scalevit.training.profiling import Profiler
from scalevit.training.resume import check_classes
from scalevit.training.run_output import RunOutput
from scalevit.training.schedules import Schedule
from scalevit.training.setting_changes import changed_fingerprint, changed_settings, described
from scalevit.training.setting_keys import DATA_KEYS
from scalevit.training.step import DivergenceCheck, TrainingStep
from scalevit.training.tasks.base import TaskRunner
from scalevit.training.throughput import Throughput, peak_flops
from scalevit.training.weight_sets import WeightSets

# Steps of a process after which the rate is worth a forecast.
_EXPECTATION_AFTER = 20


class Trainer:
    """Trains one run; every method is collective. `scalevit.training.run.prepare` makes what it is built from."""

    _after_evaluation: Callable[[Path], object] | None = None

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        task: TaskRunner,
        data: RunData,
        folder: RunFolder,
        tracking: Tracking,
        costs: ModelCosts,
        environment: Mapping[str, Any],
        initial_weights: Coverage | None = None,
    ):
        """
        Args:
            config: of the run, with the model's defaults filled in.
            world: this process among its peers.
            engine: holds the model and the optimizer.
            task: what the model is trained for, started with the engine.
            data: training and validation loaders, and mixing.
            folder: of the run.
            tracking: where records go; only rank 0 opens it.
            costs: of the model.
            environment: versions and machine, for the run folder.
            initial_weights: what they gave to the model, for the record.
        """
        self.config, self.world, self.engine, self.task, self.data = config, world, engine, task, data
        self.folder, self.costs, self.environment = folder, costs, environment
        self.initial_weights = initial_weights
        train, loader = config.train, data.train
        self.total_steps = int(min(loader.steps_in(train.epochs), train.max_steps or math.inf))
        self.state = RunState()
        self.schedule = Schedule.from_config(config, loader.steps_in(train.epochs) / train.epochs)
        self.ema = Ema.from_config(config.ema, engine)
        self.weight_sets = WeightSets(engine, self.ema)
        self.step = TrainingStep(
            engine,
            task,
            self.ema,
            transform=loader.finish,
            mixing=data.mixing,
            split=loader.split,
            seed=config.seed,
            channels_last=train.channels_last,
        )
        self.cadence = Cadence(
            self.total_steps,
            log_every_steps=train.log_every_steps,
            evaluate_every_epochs=config.evaluation.every_epochs,
            save_every_epochs=train.checkpoint.every_epochs,
            save_every_steps=train.checkpoint.every_steps,
        )
        # Where images have several sizes, the cost of one is none of all.
        peak = None if loader.image_sizes else peak_flops(world.device, train.precision)
        self.throughput = Throughput(costs.training_flops, peak * world.size if peak else None)
        self.interval, self.divergence = Interval(world), DivergenceCheck()
        self.saver = Saver(folder.checkpoints, world, train.checkpoint)
        self.output = RunOutput(config, world, folder, tracking, classes=data.classes, index_faults=data.index_faults)
        self._evaluation: Evaluation | None = None  # of the weights after the last step, if they were evaluated
        self._lr = math.nan

    def fit(
        self, *, resume_from: Sequence[Path] = (), after_evaluation: Callable[[Path], object] | None = None
    ) -> Summary:
        """Trains to the end.

        Args:
            resume_from: checkpoints to resume from, the newest first; damaged ones are passed over.
            after_evaluation: called on rank 0 with the run folder after each evaluation; must not raise.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was saved.
            UserError: the data, the disk or the numbers end the run.
        """
        self._after_evaluation = after_evaluation
        try:
            self._start(resume_from)
            self._run_steps()
            return self._finish()
        except (UserError, Interrupted):
            # All ranks leave together here, so there is time to finish what is being written.
            try:
                self.saver.wait()
            finally:
                self.output.close()
            raise

    def _start(self, resume_from: Sequence[Path]) -> None:
        """Restores a checkpoint, if there is one, and opens run folder and trackers."""
        names = ", ".join(checkpoint.name for checkpoint in resume_from)
        self.world.check_equal_across_ranks("what can be resumed from", names or None)
        resumed = self._resume(newest_intact(resume_from, self.world)) if resume_from else None
        self.output.open(self.state, self.environment)
        # For who watches the run: how far it will go.
        self.output.log({**(resumed or {"kind": "start", "step": 0}), "steps": self.total_steps})
        if resumed is None and self.initial_weights is not None:
            self.output.log({"kind": "initial_weights", "step": 0, **asdict(self.initial_weights)})
        if resumed is None and self.task.fingerprint:
            self.output.log({"kind": "task", "step": 0, **self.task.fingerprint})
        self.output.record_faults(self.state.step)

    def _resume(self, checkpoint: Path) -> Record:
        """Restores a checkpoint; returns the record of it."""
        record = read_record(checkpoint)
        if record["data"] is not None:  # a converted checkpoint knows no order of samples
            with self.world.collective_errors():
                check_fingerprint(record["data"], self.data.train.fingerprint, f"checkpoint {checkpoint}", DATA_KEYS)
                check_classes(record.get("classes"), self.data.classes, f"checkpoint {checkpoint}")
        kept = state_tensors(self.config.optimizer.name, self.config.optimizer.args)
        self.state = restore(checkpoint, self.engine, self.ema.tensors if self.ema else None, kept=kept)
        self.throughput.add(self.state.timed_images, self.state.seconds)
        changes = changed_settings(record["config"], self.config.model_dump(mode="json"))
        changes |= changed_fingerprint(record.get("task", {}), self.task.fingerprint)
        if changes:
            self.state.changes.append({"step": self.state.step, "changes": changes})
        if self.world.is_first:
            print(f"resuming {self.folder.path} at step {self.state.step}", flush=True)
            for change in described(changes):
                print(f"changed since that checkpoint: {change}", flush=True)
        return {"kind": "resume", "step": self.state.step, "changes": changes}

    def _run_steps(self) -> None:
        state, world, loader = self.state, self.world, self.data.train
        first_step, seconds_before = state.step, self.throughput.seconds
        shown = world.is_first and first_step < self.total_steps
        if world.is_first and not shown:
            print(f"{self.folder.path} is finished: {first_step:,} of {self.total_steps:,} steps are done", flush=True)
        micro_batches = loader.batches(first_step)
        with (
            Profiler(self.config.train, self.folder.profile, world, first_step=first_step) as profiler,
            PreemptionHandler(verbose=world.is_first) as preemption,
            ProgressBar(self.config.name, self.total_steps, "steps", done=first_step, visible=shown) as bar,
        ):
            self.engine.train()
            while state.step < self.total_steps:
                epoch = loader.epoch_of(state.step)
                # A process's first step warms up and waits for its loader, so it does not count for the rate.
                with profiler.step(state.step):
                    self._take_step(micro_batches, epoch, timed=state.step > first_step)
                bar.advance(self._status_line())
                if state.step == first_step + _EXPECTATION_AFTER:
                    bar.line(f"after {_EXPECTATION_AFTER} steps: {self._expectation(seconds_before)}")
                epoch_ends = state.step == loader.epoch_end_step(epoch)
                due = self.cadence.after(state.step, epochs_done=epoch + 1 if epoch_ends else None)
                if due.log:
                    self._log_training(epoch)
                if due.evaluate:
                    bar.line(f"epoch {epoch + 1}: {self._evaluate(epoch)}")
                interrupted = world.any(preemption.requested or self.saver.failed)
                if interrupted:
                    self.saver.wait()  # raises if a failed save is the reason
                if due.save or interrupted:
                    self.output.record_faults(state.step)
                    self._save()
                if interrupted and state.step < self.total_steps:
                    self.saver.wait()
                    bar.line(f"stopped after step {state.step}; run the same command to resume")
                    preemption.exit()
            self.saver.wait()  # inside the block, where a signal does not end it
        if not state.epochs or state.epochs[-1]["step"] != state.step:
            # Interrupted by a signal, and then resumed with a train.max_steps that it has passed.
            self._evaluate(loader.epoch_of(state.step - 1))

    def _take_step(self, micro_batches: Iterator[Batch], epoch: int, *, timed: bool) -> None:
        """One optimizer step, and what is counted of it."""
        state, epochs = self.state, self.config.train.epochs
        progress = state.step * epochs / self.data.train.steps_in(epochs)
        # Of the EMA, or else (where it was turned on later) of the weights.
        keys = [record_key(name, self.config.evaluation.metric) for name in self.weight_sets.names[::-1]]
        self._lr = self.schedule.lr_of_step(epoch, progress, state.metric_by_epoch(*keys))
        self._evaluation = None
        report = self.step(micro_batches, step=state.step, lr=self._lr)
        self.interval.add(report, self.data.train.image_size(state.step))
        state.step += 1
        self.output.new_faults += report.faults
        if timed:
            self.throughput.add(self.config.train.global_batch, report.seconds)
        self.divergence.add(report.result, step=state.step)

    def _status_line(self) -> str:
        rate = self.throughput.images_per_second
        shown = f", {rate:,.4g} images/s, data wait {self.interval.latest_data_wait:.0%}" if rate else ""
        return f"loss {self.interval.latest_loss:.4f}, lr {self._lr:.2e}{shown}"

    def _expectation(self, seconds_before: float) -> str:
        """Time and memory of the rest of the run, from the first steps of this process.

        Args:
            seconds_before: time in steps of earlier processes.
        """
        # The first step is not timed.
        per_step = (self.throughput.seconds - seconds_before) / (_EXPECTATION_AFTER - 1)
        remaining = self.total_steps - self.state.step
        text = f"{per_step:.3g} s per step, {format_duration(remaining * per_step)} for the {remaining:,} steps left"
        if total := self.world.memory_bytes():
            text += f", {format_bytes(self.world.peak_memory_bytes())} of {format_bytes(total)} in use at most"
        return text

    def _log_training(self, epoch: int) -> None:
        losses, sums = self.interval.take(self.config.train.global_batch)
        self.output.record_faults(self.state.step)
        self.output.log(
            {
                "kind": "train",
                "step": self.state.step,
                "epoch": epoch + 1,
                **losses,
                "lr": self._lr,
                **sums,
                "loss_scale": self.engine.loss_scale.value,
                "mfu": self.throughput.mfu,
                "peak_memory_bytes": self.world.peak_memory_bytes(),
                "data_faults": self.output.fault_count,
            }
        )

    def _evaluate(self, epoch: int) -> Evaluation:
        """Evaluates every set of weights, records the result and keeps the best weights."""
        log = PredictionLog(self.config.evaluation.examples, self.data.evaluation.rows)
        evaluation = evaluate_weight_sets(
            self.weight_sets,
            self.engine,
            self.data.evaluation,
            self.config.task.forms(self.engine.module),
            channels_last=self.config.train.channels_last,
            faults=self.output.new_faults,
            log=log,
        )
        self.output.record_faults(self.state.step)
        record = {"kind": "evaluation", "step": self.state.step, "epoch": epoch + 1, **evaluation.to_record()}
        # A run that is resumed after a train.max_steps evaluates the epoch in which it stopped a second time.
        self.state.epochs = [earlier for earlier in self.state.epochs if earlier["epoch"] != epoch + 1]
        self.state.epochs.append(record)
        self.output.log(record)
        for weight_set in self.weight_sets.names:
            if record is best_epoch(self.state.epochs, weight_set, self.config.evaluation.metric):
                self.output.write_weights("best", weight_set, self.weight_sets, self.engine)
        self._evaluation = evaluation
        self.output.write_predictions(log, self.state.step, epoch + 1, self.weight_sets.names[-1])
        if self._after_evaluation is not None and self.world.is_first:
            self._after_evaluation(self.folder.path)
        return evaluation

    def _save(self) -> None:
        """Saves a checkpoint."""
        self.state.seconds, self.state.timed_images = self.throughput.seconds, self.throughput.images
        about = {
            "config": self.config.model_dump(mode="json"),
            "data": self.data.train.fingerprint,
            "classes": self.data.classes,
            "task": dict(self.task.fingerprint),
        }
        score = None if self._evaluation is None else self._evaluation.score(self.config.evaluation.metric)
        self.saver.save(self.engine, self.ema.tensors if self.ema else None, self.state, about, score)

    def _finish(self) -> Summary:
        self.saver.wait()
        for weight_set in self.weight_sets.names:
            self.output.write_weights("final", weight_set, self.weight_sets, self.engine)
        return self.output.finish(self.state, self.throughput, self.costs)
