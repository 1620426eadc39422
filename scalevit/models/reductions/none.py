"""The unreduced model."""

from typing import Literal

from scalevit.models.reductions.base import Reduction


class NoReduction(Reduction):
    """The unchanged model."""

    strategy: Literal["none"] = "none"
