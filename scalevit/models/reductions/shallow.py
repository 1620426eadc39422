"""ShallowMLP (arXiv:2512.01059, section 3): the hidden width of a built model's MLPs is cut."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from scalevit.errors import SettingError
from scalevit.models.reductions.base import BlockMlp, Reduction

if TYPE_CHECKING:
    from scalevit.models.mlps import MlpView


class ShallowReduction(Reduction):
    """ShallowMLP: each MLP keeps some of its hidden units; all other parameters are initialised as in the baseline."""

    strategy: Literal["shallow"] = "shallow"
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Fraction of the hidden units that is kept: int(keep * hidden) of them."""
    select_units: Literal["first", "importance"] = "first"
    """first keeps the first units (the paper); importance those with the largest weights, for pretrained models."""

    def transform(self, mlp: "MlpView", block: int, depth: int) -> None:
        kept = int(self.keep * mlp.hidden)
        if kept < 1:
            raise SettingError("keep", self.keep, f"leaves none of the {mlp.hidden} hidden units")
        mlp.narrow(kept, select_units=self.select_units)

    def structure(self, depth: int) -> dict[str, Any]:
        return {"strategy": self.strategy, "keep": self.keep}

    @classmethod
    def recognise(cls, found: Sequence[BlockMlp], unreduced: Sequence[BlockMlp]) -> "ShallowReduction | None":
        if any(mlp.source != block for block, mlp in enumerate(found)):
            return None
        kept = {mlp.hidden / own.hidden for mlp, own in zip(found, unreduced, strict=True)}
        return cls(keep=min(kept)) if len(kept) == 1 and min(kept) < 1 else None
