"""ThinMLP (arXiv:2512.01059, section 3): the model is built with a narrower MLP."""

from typing import Literal

from pydantic import PositiveFloat

from scalevit.models.reductions.base import Reduction


class ThinReduction(Reduction):
    """ThinMLP: the model is built with a narrower MLP."""

    strategy: Literal["thin"] = "thin"
    mlp_ratio: PositiveFloat = 2.0
    """Hidden width over embedding width, given to the timm factory."""
