"""What a run writes while it trains: records, bad samples, weights files and the summary.

Every method is collective; rank 0 writes, and all ranks leave together where it cannot.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from scalevit.checkpoint.run_state import RunState
from scalevit.config.tree import Config
from scalevit.data.faults import Fault, FaultLog
from scalevit.distributed import World
from scalevit.engines.base import Engine
from scalevit.errors import naming_settings
from scalevit.models.costs import ModelCosts
from scalevit.models.weights.write import write_weights
from scalevit.runs.folder import RunFolder
from scalevit.runs.records import Record
from scalevit.runs.summary import EMA, WEIGHTS, AccuracySummary, Summary
from scalevit.runs.trackers.base import RunInfo
from scalevit.runs.tracking import Tracking
from scalevit.training.predictions import PredictionLog
from scalevit.training.setting_keys import TRACKER_KEYS, naming_data_settings
from scalevit.training.tasks.base import without_own
from scalevit.training.throughput import Throughput
from scalevit.training.weight_sets import WeightSets, file_name


class RunOutput:
    """The run folder and the trackers of one run."""

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        tracking: Tracking,
        *,
        classes: Sequence[str] | None,
        index_faults: list[Fault],
    ):
        """
        Args:
            config: of the run.
            world: this process among its peers.
            folder: of the run.
            tracking: where records go; only rank 0 opens it.
            classes: names of the labels, if they are known.
            index_faults: samples that the indexes leave out.
        """
        self._config, self._world, self._folder, self._tracking = config, world, folder, tracking
        self._classes = classes
        self._faults = FaultLog(folder.data_faults, limit=config.data.max_faults, writes=folder.writes)
        self.new_faults = list(index_faults)
        """Bad samples that this rank has met and `record_faults` has not yet listed."""

    @property
    def fault_count(self) -> int:
        """Distinct bad samples of the run."""
        return self._faults.count

    def open(self, state: RunState, environment: Mapping[str, Any]) -> None:
        """Opens run folder and trackers, and keeps in the state what a resumed run hands back to the trackers."""
        config = self._config.model_dump(mode="json")
        with self._world.collective_errors(), naming_settings(TRACKER_KEYS):
            self._folder.open(config, environment, classes=self._classes, changes=state.changes)
            if self._world.is_first:
                info = RunInfo(self._config.name, self._folder.path, config, state.step)
                state.trackers = self._tracking.open(info, state.trackers)

    def log(self, record: Record) -> None:
        """Sends a record with its time to metrics.jsonl and the trackers."""
        with self._world.collective_errors():
            if self._world.is_first:
                self._tracking.log({**record, "time": round(time.time(), 3)})

    def record_faults(self, step: int) -> None:
        """Lists the bad samples that any rank met, and ends the run beyond the limit."""
        faults, self.new_faults = self._world.gather(self.new_faults), []
        with self._world.collective_errors(), naming_data_settings():
            self._faults.add(faults, step=step)

    def write_weights(self, prefix: str, weight_set: str, weight_sets: WeightSets, engine: Engine) -> None:
        """Writes a set of weights into the run folder, for use elsewhere.

        Args:
            prefix: of the file's name, "best" or "final".
        """
        full = without_own(weight_sets.gather(weight_set))
        with self._world.collective_errors():
            if self._world.is_first:
                write_weights(
                    self._folder.weights(file_name(prefix, weight_set)),
                    full,
                    model=self._config.model,
                    reduction=self._config.reduction,
                    tied=engine.tied,
                    classes=self._classes,
                )

    def write_predictions(self, log: PredictionLog, step: int, epoch: int, weight_set: str) -> None:
        """Writes what a run's page shows of an evaluation, in place of that of the one before."""
        record = log.to_record(self._world)
        with self._world.collective_errors():
            self._folder.write_predictions({"step": step, "epoch": epoch, "weight_set": weight_set, **record})

    def finish(self, state: RunState, throughput: Throughput, costs: ModelCosts) -> Summary:
        """Writes the summary and closes the trackers."""
        config, epochs, metric = self._config, state.epochs, self._config.evaluation.metric
        summary = Summary(
            name=config.name,
            weights=AccuracySummary.of(epochs, WEIGHTS, metric),
            ema=AccuracySummary.of(epochs, EMA, metric) if config.ema.enabled else None,
            images_per_second=throughput.images_per_second,
            mfu=throughput.mfu,
            steps=state.step,
            data_faults=self.fault_count,
            epochs=config.train.epochs,
            parameters=costs.parameters,
            mlp_parameters=costs.mlp_parameters,
            unique_mlps=costs.unique_mlps,
            gmacs=costs.macs / 1e9,
            reduction=config.reduction.strategy,
            engine=config.engine.model_dump(mode="json"),
            precision=config.train.precision,
            world_size=self._world.size,
            seed=config.seed,
        )
        with self._world.collective_errors():
            self._folder.write_summary(summary.to_json())
        self._tracking.close(summary)
        return summary

    def close(self) -> None:
        """Closes the trackers of a run that did not finish."""
        self._tracking.close(None)
