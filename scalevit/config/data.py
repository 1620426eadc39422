"""The data section: where images come from and how they are augmented. Plain settings; must not know a room."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scalevit.config.base import FilePath, NonNegativeFloat, NonNegativeInt, Section, UnitInterval


class AugmentationConfig(Section):
    """Augmentation of training images. The defaults are timm's with the paper's changes."""

    aug_repeats: PositiveInt = 3
    """Augmented copies of each decoded image (repeated augmentation). The length of an epoch does not change."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width over height) of the random crop."""
    hflip: UnitInterval = 0.5
    """Probability of a horizontal flip."""
    color_jitter: UnitInterval = 0.4
    """Strength of colour jitter; not used together with auto_augment (as in timm)."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """A RandAugment or AutoAugment policy in timm's notation; null applies none."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Resampling of the training crop; random chooses bilinear or bicubic for each image."""
    random_erasing: UnitInterval = 0.25
    """Probability that a rectangle of an image is erased (timm's pixel mode)."""
    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup's Beta distribution; 0 disables mixup."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix's Beta distribution; 0 disables CutMix. With both enabled, each group of images uses one."""
    mixup_prob: UnitInterval = 1.0
    """Probability that a group of images is mixed."""
    mixing_group: PositiveInt = 256
    """Images of the global batch that are mixed alike: by mixup or CutMix, with one weight and one rectangle. Must be
    even. The paper's batches had 256 images on each device."""

    @model_validator(mode="after")
    def _ranges(self) -> "AugmentationConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: the first must not be greater than the second")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale = {list(self.crop_scale)}: a crop is at most the whole image (1.0)")
        return self


class DataConfig(Section):
    """WebDataset shards and how their images become tensors."""

    train: FilePath = "data/imagenet/train"
    """Training shards: a folder of .tar files, a pattern with * or {000..146}, or an address (s3://, gs://, https://)."""
    validation: FilePath = "data/imagenet/validation"
    """Validation shards, in the same forms."""
    builtin: Literal["digits"] | None = None
    """digits: scikit-learn's handwritten digits, written as shards to those two folders if they are missing; null: the
    shards must exist."""
    workers: NonNegativeInt = 8
    """Loader processes per rank; 0 loads in the training process. Results do not depend on it."""
    transforms: Literal["timm", "fast"] = "timm"
    """timm: timm's transforms. fast: the same recipe with the resize in torch (pixels differ from timm's by at most two
    levels) and the augmentation in numpy. Normalisation and random erasing are done on the device in both cases."""
    exif_orientation: bool = True
    """Turn images as their EXIF records say. timm and torchvision do not: false gives their pixels."""
    label_key: str = "label"
    """Key of the label in `.json` members of the shards; not used for `.cls` and `.txt` members."""
    class_names: FilePath | None = None
    """File with the names of labels 0, 1, ..., one per line or a JSON list, for shards whose labels are names, or which
    have no names. null: labels are integers, and a `set.json` may have their names."""
    max_faults: NonNegativeInt = 100
    """Maximum number of bad samples in a run, training and validation together. They are listed in
    `runs/NAME/data_faults.jsonl`. In training they are replaced by other samples, in evaluation they count as wrong."""
    stream_samples_per_epoch: PositiveInt | None = None
    """Read the training shards as a stream with this number of samples per epoch: for `pipe:` commands and servers
    without range requests. A stream is not exactly resumable, supports no repeats and needs at least one shard per
    worker. null reads samples at any position."""
    cache: str | None = None
    """Folder on each node that caches chunks of shards at an address (s3://, gs://, https://); null fetches every
    sample separately."""
    cache_gb: PositiveFloat | None = None
    """Maximum size of that folder in gigabytes; null for no limit. `scalevit shards plan` estimates what is needed."""
    mean: tuple[UnitInterval, UnitInterval, UnitInterval] | None = None
    """Per-channel mean of the normalisation; null takes that of the timm model."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Per-channel standard deviation of the normalisation; null takes that of the timm model."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Evaluation: side of the central crop as a fraction of the resized side; null takes that of the timm model."""
    augmentation: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _builtin_goes_to_folders(self) -> "DataConfig":
        for name in ("train", "validation"):
            path = getattr(self, name)
            if self.builtin and (path.endswith(".tar") or "://" in path or set(path) & set("*?[]{}")):
                raise ValueError(f"{name} = {path!r}: builtin data sets are written to a plain folder")
        return self
