"""GroupedMLP (arXiv:2512.01059, section 3): neighbouring blocks share one MLP."""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from scalevit.config.base import NonNegativeInt
from scalevit.models.reductions.base import Reduction


class GroupedReduction(Reduction):
    """GroupedMLP: the blocks of a group share one MLP, that of the group's first block."""

    strategy: Literal["grouped"] = "grouped"
    group_size: Annotated[int, Field(ge=2)] | None = None
    """How many neighbouring blocks share an MLP (2 when neither this nor `groups` is given). The depth must be a
    multiple of it."""
    groups: list[Annotated[list[NonNegativeInt], Field(min_length=1)]] | None = None
    """Explicit groups of block indices, for example [[0, 1], [2, 3, 4]]; blocks not named keep their own MLP."""
    scale: PositiveFloat = 1 / math.sqrt(2)
    """Factor on the shared `fc1.weight`, `fc1.bias` and `fc2.weight` at initialisation (the paper's 1/sqrt(2))."""

    @model_validator(mode="after")
    def _one_grouping(self) -> "GroupedReduction":
        if self.group_size is not None and self.groups is not None:
            raise ValueError("give group_size or groups, not both")
        return self
