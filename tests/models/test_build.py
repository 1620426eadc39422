"""What `build_model` refuses before a run starts."""

import pytest

from scalevit.config.model import ModelConfig
from scalevit.errors import SettingError
from scalevit.models.build import build_model
from scalevit.models.reductions.none import NoReduction


def build(image_size: int, **kwargs: object) -> None:
    config = ModelConfig(name="vit_tiny_patch16_224", image_size=image_size, kwargs={"depth": 1, **kwargs})
    build_model(config, NoReduction(), seed=0, device="meta")


@pytest.mark.parametrize(
    ("image_size", "advice"), [(17, "patch size 4: use 16 or 20"), (3, "patch size 4: use 4"), (30, "use 28 or 32")]
)
def test_images_that_patches_do_not_divide_are_refused(image_size: int, advice: str) -> None:
    with pytest.raises(SettingError, match=rf"^model\.image_size = {image_size}: is not a multiple .*{advice}, or pad"):
        build(image_size, patch_size=4)


def test_a_model_that_pads_takes_any_image() -> None:
    build(17, patch_size=4, dynamic_img_pad=True)
    build(16, patch_size=4)
