"""The seam of parameter reductions: which block uses whose MLP, and how the kept MLPs are changed.

Knows settings and block indices. Must not import torch at module level; `apply.py` does the work on a model.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from scalevit.config.base import Part
from scalevit.errors import SettingError

if TYPE_CHECKING:
    from scalevit.models.mlps import MlpView


class BlockMlp(NamedTuple):
    """The MLP of a block, as tensors show it."""

    source: int | None
    """The first block with the same MLP: the block itself where that is no earlier one. None: there is no MLP."""
    hidden: int
    """Number of hidden units; 0 without an MLP."""
    width: int
    """Features of the output; 0 without an MLP."""


class Reduction(Part):
    """How the parameters of a Vision Transformer's MLPs are reduced; `strategy` names the kind.

    The defaults below are the unchanged model: a new reduction overrides what it changes. All methods are pure
    functions of the settings and their arguments, except `transform`, which changes its MLP.
    """

    strategy: str
    changes_model: ClassVar[bool] = True
    """False for the baseline only, whose weights fit the model as timm builds it."""

    def factory_arguments(self) -> dict[str, Any]:
        """Arguments for timm's model factory, which the user must not set as well."""
        return {}

    def source(self, block: int, depth: int) -> int | None:
        """The block whose MLP this block uses: itself, an earlier one that uses its own, or None for no MLP.

        Args:
            block: index of the block, 0 to depth - 1.
            depth: number of blocks of the model.

        Raises:
            SettingError: the settings do not fit a model of this depth.
        """
        return block

    def transform(self, mlp: "MlpView", block: int, depth: int) -> None:
        """Changes an initialised MLP in place, e.g. scales or narrows it. Called once for each MLP that is kept.

        Args:
            block: the block that the MLP belongs to.

        Raises:
            SettingError: the settings do not fit this MLP.
        """

    def structure(self, depth: int) -> dict[str, Any]:
        """What two models of one depth must have in common so that one can load the other's weights.

        All settings unless overridden: leave out what acts at initialisation only, and write in one form what can be
        given in several.

        Raises:
            SettingError: as `source`.
        """
        return self.model_dump(mode="json")

    @classmethod
    def recognise(cls, found: Sequence[BlockMlp], unreduced: Sequence[BlockMlp]) -> "Reduction | None":
        """The reduction of this kind that explains the MLPs of weights; None if there is none. For messages.

        Args:
            found: of each block, in weights that do not say how their model was reduced.
            unreduced: of each block of the model, which has as many.
        """
        return None


def fraction_of(units: int, hidden: int) -> float:
    """The fraction of `hidden` that gives `units` when the product is rounded down, as timm and `kept_units` do."""
    fraction = units / hidden
    # Where the quotient was rounded down, its product may be below `units`; that of the next number is not.
    return fraction if int(fraction * hidden) == units else math.nextafter(fraction, math.inf)


def kept_units(mlp: "MlpView", keep: float) -> int:
    """How many hidden units an MLP keeps of which the setting `keep` is the fraction.

    Raises:
        SettingError: none would be left.
    """
    kept = int(keep * mlp.hidden)
    if kept < 1:
        raise SettingError("keep", keep, f"leaves none of the {mlp.hidden} hidden units")
    return kept
