"""ThinMLP (arXiv:2512.01059, section 3): the model is built with a narrower MLP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat

from scalevit.errors import SettingError
from scalevit.models.reductions.base import BlockMlp, Reduction, fraction_of

if TYPE_CHECKING:
    from scalevit.models.mlps import MlpView


class ThinReduction(Reduction):
    """ThinMLP: the model is built with a narrower MLP."""

    strategy: Literal["thin"] = "thin"
    mlp_ratio: PositiveFloat = 2.0
    """Hidden width over embedding width, passed to the timm factory."""

    def factory_arguments(self) -> dict[str, Any]:
        return {"mlp_ratio": self.mlp_ratio}

    def transform(self, mlp: "MlpView", block: int, depth: int) -> None:
        if int(mlp.width * self.mlp_ratio) < 1:
            # timm silently takes the embedding width instead.
            raise SettingError("mlp_ratio", self.mlp_ratio, f"leaves no hidden units at width {mlp.width}")

    @classmethod
    def recognise(cls, found: Sequence[BlockMlp], unreduced: Sequence[BlockMlp]) -> "ThinReduction | None":
        if any(mlp.source != block for block, mlp in enumerate(found)):
            return None
        narrower = all(mlp.hidden < own.hidden for mlp, own in zip(found, unreduced, strict=True))
        ratios = {fraction_of(mlp.hidden, mlp.width) for mlp in found}
        return cls(mlp_ratio=min(ratios)) if narrower and len(ratios) == 1 else None
