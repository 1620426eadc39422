"""Width-nested training: one set of weights at several widths (universally slimmable networks, arXiv:1903.05134).

Each step trains the largest width, the smallest, and some between them (the sandwich rule). The narrower ones learn
what the largest predicts (in-place distillation).
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from scalevit.config.base import NonNegativeInt
from scalevit.training.tasks.base import DeviceBatch, Form, Forward, Task, TaskLoss, TaskRunner

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scalevit.config.model import KernelsConfig
    from scalevit.config.tree import Config
    from scalevit.distributed import World
    from scalevit.models.nested import NestedWidths

Width = Annotated[float, Field(gt=0.0, le=1.0)]


class NestedWidthTask(Task):
    """Classification at several widths of the MLPs, with one set of weights."""

    name: Literal["nested_width"] = "nested_width"
    widths: Annotated[list[Width], Field(min_length=2)] = [0.25, 0.5, 0.75, 1.0]
    """Fractions of the hidden units of each MLP, ascending, the last one 1. A width uses the first units; they must be
    a multiple of 16. The model is evaluated at each (`top1_width_0.5`), and can be cut to any."""
    random_widths: NonNegativeInt = 2
    """Widths between the smallest and the largest that are trained in a step besides these two, drawn from `widths`
    for each step without repetition (the paper's 2). Each width is a forward and a backward pass."""
    targets: Literal["largest", "labels"] = "largest"
    """What widths below the largest learn: largest: its predictions, without a gradient through them (in-place
    distillation); labels: what it learns itself (slimmable networks, arXiv:1812.08928)."""

    @model_validator(mode="after")
    def _ascending(self) -> "NestedWidthTask":
        if self.widths != sorted(set(self.widths)) or self.widths[-1] != 1.0:
            raise ValueError(f"widths = {self.widths}: must ascend to 1.0")
        if len({f"{width:g}" for width in self.widths}) < len(self.widths):
            raise ValueError(f"widths = {self.widths}: two are the same in six digits, which name their metrics")
        return self

    @property
    def not_estimated(self) -> list[str]:
        return ["widths"]

    def build(self, config: "Config", world: "World") -> "NestedWidthRunner":
        return NestedWidthRunner(self, config)

    def adapt(self, model: "nn.Module", kernels: "KernelsConfig") -> None:
        from scalevit.models.nested import NestedWidths, make_nested

        make_nested(model, kernels)
        NestedWidths(model).check(self.widths)

    def forms(self, model: "nn.Module") -> Mapping[str, Form]:
        from scalevit.models.nested import NestedWidths

        nested = NestedWidths(model)
        narrow = {f"width_{width:g}": partial(nested.at, width) for width in self.widths[:-1]}
        return {"": partial(nested.at, None), **narrow}


class NestedWidthRunner(TaskRunner):
    """One pass per width: the largest, the smallest, then those that are drawn for the step."""

    def __init__(self, settings: NestedWidthTask, config: "Config"):
        self._settings, self._loss, self._seed = settings, config.loss, config.seed
        self._between = settings.widths[1:-1]
        self.passes = 2 + min(settings.random_widths, len(self._between))
        self.summary = (
            f"nested widths {', '.join(f'{width:g}' for width in settings.widths)}, {self.passes} in each step"
        )
        self._nested: NestedWidths | None = None
        self._largest: Tensor | None = None  # the largest width's logits for the micro-batch

    def start(self, model: "nn.Module") -> None:
        from scalevit.models.nested import NestedWidths

        self._nested = NestedWidths(model)

    def widths_of(self, step: int) -> list[float]:
        """The width of each pass of a step, the same for every micro-batch and on every rank."""
        import numpy as np

        from scalevit.randomness import Purpose, row_keys, uniforms

        draws = uniforms(row_keys(self._seed, Purpose.WIDTHS, step, np.zeros(1, np.int64)), len(self._between))[0]
        drawn = [self._between[place] for place in np.argsort(draws, kind="stable")[: self.passes - 2]]
        return [1.0, self._settings.widths[0], *drawn]

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        from scalevit.training.tasks.divergence import softened_divergence

        assert self._nested is not None, "start"
        # The width stays as it is until the next pass: recomputed blocks need it in the backward.
        self._nested.set(self.widths_of(batch.step)[index])
        logits = forward(batch.images).float()
        if index == 0:
            self._largest = logits.detach()
        if index == 0 or self._settings.targets == "labels":
            total = self._loss.weighted_sum(logits, batch.labels, batch.weights)
        else:
            assert self._largest is not None, "the largest width is the first pass"
            total = (softened_divergence(logits, self._largest) * batch.weights).sum()
        return TaskLoss(total, {("largest", "smallest", "between")[min(index, 2)]: total})
