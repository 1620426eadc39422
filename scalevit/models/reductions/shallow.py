"""ShallowMLP (arXiv:2512.01059, section 3): a built model's MLPs keep a part of their hidden units."""

from typing import Annotated, Literal

from pydantic import Field

from scalevit.models.reductions.base import Reduction


class ShallowReduction(Reduction):
    """ShallowMLP: each MLP keeps the first part of its hidden units; everything else keeps its initialisation."""

    strategy: Literal["shallow"] = "shallow"
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the hidden units that is kept: int(keep * hidden) of them."""
    select_units: Literal["first", "importance"] = "first"
    """first keeps the first units (the paper); importance those with the largest weights, for pretrained models."""
