"""ShallowMLP (arXiv:2512.01059, section 3): the hidden width of a built model's MLPs is cut."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from scalevit.config.base import NonNegativeInt
from scalevit.errors import SettingError
from scalevit.models.reductions.base import BlockMlp, Reduction, fraction_of, kept_units

if TYPE_CHECKING:
    from scalevit.models.mlps import MlpView


class ShallowReduction(Reduction):
    """ShallowMLP: each MLP keeps some of its hidden units; all other parameters are initialised as in the baseline."""

    strategy: Literal["shallow"] = "shallow"
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Fraction of the hidden units that is kept: int(keep * hidden) of them."""
    select_units: Literal["first", "importance"] = "first"
    """first keeps the first units (the paper); importance those with the largest weights, for pretrained models."""
    blocks: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Blocks whose MLPs are narrowed, for example [0, 1, 5]; null narrows all."""

    def transform(self, mlp: "MlpView", block: int, depth: int) -> None:
        if block in self._narrowed(depth):
            mlp.narrow(kept_units(mlp, self.keep), select_units=self.select_units)

    def structure(self, depth: int) -> dict[str, Any]:
        narrowed = self._narrowed(depth)
        some = {} if len(narrowed) == depth else {"blocks": narrowed}
        return {"strategy": self.strategy, "keep": self.keep, **some}

    @classmethod
    def recognise(cls, found: Sequence[BlockMlp], unreduced: Sequence[BlockMlp]) -> "ShallowReduction | None":
        if any(mlp.source != block for block, mlp in enumerate(found)):
            return None
        kept = [fraction_of(mlp.hidden, own.hidden) for mlp, own in zip(found, unreduced, strict=True)]
        narrowed = [block for block, fraction in enumerate(kept) if fraction < 1]
        if not narrowed or len({kept[block] for block in narrowed}) > 1 or max(kept) > 1:
            return None
        return cls(keep=min(kept), blocks=None if len(narrowed) == len(kept) else narrowed)

    def _narrowed(self, depth: int) -> list[int]:
        for block in self.blocks or ():
            if block >= depth:
                raise SettingError(
                    "blocks", self.blocks, f"names block {block}, but the model has blocks 0 to {depth - 1}"
                )
        return list(range(depth)) if self.blocks is None else sorted(set(self.blocks))
