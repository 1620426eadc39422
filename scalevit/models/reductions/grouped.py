"""GroupedMLP (arXiv:2512.01059, section 3): neighbouring blocks share one MLP, which may be narrowed as well."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from scalevit.config.base import NonNegativeInt
from scalevit.errors import SettingError
from scalevit.models.reductions.base import BlockMlp, Reduction, fraction_of, kept_units

if TYPE_CHECKING:
    from scalevit.models.mlps import MlpView


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
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of the hidden units that each MLP keeps, shared or not: the first int(keep * hidden). Below 1, this is
    grouped and shallow combined; the paper has one or the other."""

    @model_validator(mode="after")
    def _one_grouping(self) -> "GroupedReduction":
        if self.group_size is not None and self.groups is not None:
            raise ValueError("give group_size or groups, not both")
        return self

    def source(self, block: int, depth: int) -> int:
        return self._group_of(block, depth)[0]

    def transform(self, mlp: "MlpView", block: int, depth: int) -> None:
        if len(self._group_of(block, depth)) > 1:
            mlp.scale(self.scale)
        if self.keep < 1:
            mlp.narrow(kept_units(mlp, self.keep))

    def structure(self, depth: int) -> dict[str, Any]:
        narrowed = {"keep": self.keep} if self.keep < 1 else {}
        return {"strategy": self.strategy, "groups": self._all_groups(depth), **narrowed}

    @classmethod
    def recognise(cls, found: Sequence[BlockMlp], unreduced: Sequence[BlockMlp]) -> "GroupedReduction | None":
        kept = {
            fraction_of(mlp.hidden, own.hidden)
            for mlp, own in zip(found, unreduced, strict=True)
            if mlp.source is not None
        }
        if len(kept) != 1 or max(kept) > 1:
            return None
        keep = kept.pop()
        groups: dict[int, list[int]] = {}
        for block, mlp in enumerate(found):
            groups.setdefault(block if mlp.source is None else mlp.source, []).append(block)
        shared = [group for group in groups.values() if len(group) > 1]
        if not shared:
            return None
        size = len(shared[0])
        if shared == [list(range(first, first + size)) for first in range(0, len(found), size)]:
            return cls(group_size=size, keep=keep)
        return cls(groups=shared, keep=keep)

    def _group_of(self, block: int, depth: int) -> list[int]:
        return next(group for group in self._all_groups(depth) if block in group)

    def _all_groups(self, depth: int) -> list[list[int]]:
        """Every block's group: lists of block indices that cover 0 to depth - 1, each in ascending order."""
        if self.groups is None:
            size = self.group_size or 2
            if depth % size:
                divisors = [str(divisor) for divisor in range(2, depth + 1) if depth % divisor == 0]
                allowed = ", ".join([*divisors, "or `groups`"]) if divisors else "none, a single block has no neighbour"
                raise SettingError(
                    "group_size", size, f"does not divide the model's {depth} blocks; allowed: {allowed}"
                )
            return [list(range(first, first + size)) for first in range(0, depth, size)]
        named = [block for group in self.groups for block in group]
        for block in named:
            if block >= depth:
                raise SettingError(
                    "groups", self.groups, f"names block {block}, but the model has blocks 0 to {depth - 1}"
                )
            if named.count(block) > 1:
                raise SettingError("groups", self.groups, f"names block {block} twice")
        ungrouped = [[block] for block in range(depth) if block not in named]
        return sorted([sorted(group) for group in self.groups] + ungrouped)
