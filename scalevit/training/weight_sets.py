"""The named sets of weights of a run, "weights" (the model's own) and "ema": each can be evaluated and written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from scalevit.engines.base import Engine
from scalevit.runs.summary import EMA, WEIGHTS
from scalevit.training.ema import Ema


class WeightSets:
    """The model's weights and, where there is one, their EMA."""

    def __init__(self, engine: Engine, ema: Ema | None):
        self._engine, self._ema = engine, ema

    @property
    def names(self) -> list[str]:
        """The model's own weights first."""
        return [WEIGHTS] if self._ema is None else [WEIGHTS, EMA]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Runs a block with a set of weights in the model. Collective."""
        if name == WEIGHTS:
            yield
        else:
            with self._engine.using(self._averages()):
                yield

    def gather(self, name: str) -> dict[str, Tensor]:
        """Full tensors on rank 0's CPU, {} elsewhere. Collective."""
        return self._engine.gather(self._engine.local_parameters() if name == WEIGHTS else self._averages())

    def _averages(self) -> Mapping[str, Tensor]:
        assert self._ema is not None, "this run has no EMA"
        return self._ema.tensors


def file_name(prefix: str, name: str) -> str:
    """Name of a weights file in the run folder, without its suffix: "best" for the model's weights, "best_ema"."""
    return prefix if name == WEIGHTS else f"{prefix}_{name}"
