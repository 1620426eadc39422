"""Models that are trained on images of several sizes. Knows timm's factory and shapes; must not know data or steps."""

from collections.abc import Sequence

from scalevit.config.model import ModelConfig
from scalevit.errors import SettingError
from scalevit.models.build import build_model
from scalevit.models.costs import count_costs
from scalevit.models.reductions.base import Reduction

_DYNAMIC = "dynamic_img_size"


def for_image_sizes(model: ModelConfig, reduction: Reduction, sides: Sequence[int]) -> ModelConfig:
    """The model as it is built to take square images of several sizes: with timm's `dynamic_img_size`, where it has it.

    The parameters, and the results at the model's own size, are those without. No weights are built.

    Args:
        sides: in pixels; [] leaves the model as it is.

    Raises:
        SettingError: "image_sizes": the model cannot process one of them. Or as `build_model`.
    """
    if not sides:
        return model
    dynamic = model.model_copy(update={"kwargs": {_DYNAMIC: True, **model.kwargs}})
    try:
        network = build_model(dynamic.without_weights(), reduction, seed=0, device="meta")
    except SettingError:  # timm's factory has no such argument; the model may take any size without it
        dynamic = model
        network = build_model(model.without_weights(), reduction, seed=0, device="meta")
    for side in sides:
        try:
            count_costs(network, side, in_chans=model.in_chans)
        except SettingError as error:
            raise SettingError("image_sizes", list(sides), f"with {side}, {error.reason}") from error
    return dynamic
