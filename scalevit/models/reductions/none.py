"""The unreduced model."""

from typing import ClassVar, Literal

from scalevit.models.reductions.base import Reduction


class NoReduction(Reduction):
    """The unchanged model."""

    strategy: Literal["none"] = "none"
    changes_model: ClassVar[bool] = False
