"""Where images come from and what happens to them."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scalevit.config.base import FilePath, NonNegativeFloat, NonNegativeInt, Section, UnitInterval


class AugmentationConfig(Section):
    """What happens to a training image; the defaults are timm's plus the paper's."""

    aug_repeats: PositiveInt = 3
    """Augmented copies of each decoded image (repeated augmentation); an epoch stays as many images long."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Area of the random crop relative to the image."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: UnitInterval = 0.5
    """Probability of a horizontal flip."""
    color_jitter: UnitInterval = 0.4
    """Strength of colour jitter; not used where auto_augment is (timm's rule)."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment / AutoAugment policy, or null."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Resampling of the training crop; random draws bilinear or bicubic."""
    random_erasing: UnitInterval = 0.25
    """Probability of erasing a rectangle (timm's pixel mode)."""
    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup's Beta distribution; 0 turns it off."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix; with both on, each batch takes one of the two."""
    mixup_prob: UnitInterval = 1.0
    """Probability that a batch is mixed at all."""

    @model_validator(mode="after")
    def _ranges(self) -> "AugmentationConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: the first must not be above the second")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale = {list(self.crop_scale)}: a crop has at most the image's area (1.0)")
        return self


class DataConfig(Section):
    """Where the WebDataset shards are and how images become tensors."""

    train: FilePath = "data/imagenet/train"
    """Training shards: a folder of .tar files, or a pattern with * or {000..146}."""
    validation: FilePath = "data/imagenet/validation"
    """Validation shards, likewise."""
    builtin: Literal["digits"] | None = None
    """digits: write scikit-learn's handwritten digits as shards to those folders when they are missing."""
    workers: NonNegativeInt = 8
    """Loader processes per rank; 0 loads in the training process. The order does not depend on it."""
    transforms: Literal["timm", "fast"] = "timm"
    """timm: its own transforms; fast: the same recipe with the resize in torch (pixels within two levels of timm's) and
    the augmentation in numpy. With both, normalisation and random erasing happen on the device."""
    label_key: str = "label"
    """Key of the label in `.json` members; `.cls` and `.txt` need none."""
    max_faults: NonNegativeInt = 100
    """So many bad samples may a run have, of training and validation together. They are listed in
    `runs/NAME/data_faults.jsonl`; in training others are shown in their place, in evaluation they count as wrong."""
    stream_samples_per_epoch: PositiveInt | None = None
    """Read the training shards as a stream, so many samples an epoch: for `pipe:` commands and servers that give no
    ranges. A stream is not exactly resumable, has no repeats, and needs a shard per worker; null reads at any place."""
    cache: str | None = None
    """Folder on each node for chunks of shards at an address (s3://, gs://, https://, ...); null fetches every sample
    by itself."""
    cache_gb: PositiveFloat | None = None
    """Most gigabytes in that folder; null for no limit. `scalevit shards plan` tells how much is needed."""
    mean: tuple[UnitInterval, UnitInterval, UnitInterval] | None = None
    """Per-channel mean of the normalisation; null takes the timm model's own."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Per-channel standard deviation; null takes the timm model's own."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Evaluation: central crop over resized side; null takes the timm model's own."""
    augmentation: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _builtin_goes_to_folders(self) -> "DataConfig":
        for name in ("train", "validation"):
            path = getattr(self, name)
            if self.builtin and (path.endswith(".tar") or "://" in path or set(path) & set("*?[]{}")):
                raise ValueError(f"{name} = {path!r}: builtin data are written to a plain folder")
        return self
