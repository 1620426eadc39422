"""What `build_model` refuses before a run starts, and the values of new classifiers."""

from pathlib import Path

import pytest
import torch

from scalevit.config.model import ModelConfig
from scalevit.errors import SettingError
from scalevit.models.build import build_model
from scalevit.models.families import initialise_classifier
from scalevit.models.meta_init import initial_values
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


TINY = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, num_classes=7, kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2}
)
HEAD = {"head_init_scale": 0.5, "head_init_bias": -2.0}


@pytest.mark.parametrize("by_leaf", [False, True], ids=["at once", "by leaf"])
def test_a_new_classifier_has_the_scale_and_the_bias_that_are_set(by_leaf: bool, tmp_path: Path) -> None:
    """As timm's trainer does; a classifier of initial weights keeps its values."""

    def values(config: ModelConfig) -> dict[str, torch.Tensor]:
        if by_leaf:
            return dict(initial_values(config, NoReduction(), seed=1))
        return dict(build_model(config, NoReduction(), seed=1).named_parameters())

    plain, changed = values(TINY), values(TINY.model_copy(update=HEAD))
    torch.testing.assert_close(changed["head.weight"], plain["head.weight"] * 0.5)
    assert changed["head.weight"].any()
    assert (changed["head.bias"] == -2.0).all()
    assert all(torch.equal(changed[name], plain[name]) for name in plain if not name.startswith("head"))
    file = tmp_path / "seven.pth"
    torch.save({name: tensor.detach().clone() for name, tensor in plain.items()}, file)
    started = TINY.model_copy(update={**HEAD, "initial_weights": str(file)})
    assert torch.equal(values(started)["head.weight"], plain["head.weight"])
    other = values(started.model_copy(update={"num_classes": 5}))
    assert (other["head.bias"] == -2.0).all()


def test_a_classifier_without_a_bias_has_no_initial_one() -> None:
    weight = {"fc.weight": torch.ones(2, 3)}
    with pytest.raises(SettingError, match=r"^model\.head_init_bias = -2\.0: the classifier has no bias$"):
        initialise_classifier(weight, TINY.model_copy(update=HEAD))
    initialise_classifier({}, TINY.model_copy(update=HEAD))
