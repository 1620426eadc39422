"""The data section: where images come from and how they are augmented. Plain settings; must not know a room."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scalevit.config.base import FilePath, NonNegativeFloat, NonNegativeInt, Section, UnitInterval


class AugmentationConfig(Section):
    """Augmentation of training images. The defaults are timm's with the paper's changes."""

    aug_repeats: PositiveInt = 3
    """Augmented copies of each decoded image (repeated augmentation). The length of an epoch does not change."""
    repeat_order: Literal["together", "timm"] = "together"
    """together: the copies of an image are in one batch, and `aug_repeats` epochs show all images. timm: the order of
    timm's RepeatAugSampler; each epoch shows another random part of the set, and drops the last partial batch. It does
    not depend on `seed`, and shuffles single images, which is slow for shards at an address."""
    repeat_processes: PositiveInt = 1
    """For timm's order: the number of processes that share it out, as GPUs in timm's run (the paper: 2)."""
    crop_mode: Literal["rrc", "rkrc", "rkrr"] = "rrc"
    """Crop, as timm's train_crop_mode. rrc: random resized crop. rkrc, rkrr: a resize that keeps the aspect ratio up to
    `crop_ratio`, then a central or a random crop; timm's defaults for them are a crop_scale of [0.8, 1] and a
    crop_ratio of [0.9, 1.11]."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as a fraction of the image."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width over height) of the random crop."""
    hflip: UnitInterval = 0.5
    """Probability of a horizontal flip."""
    vflip: UnitInterval = 0.0
    """Probability of a vertical flip."""
    color_jitter: UnitInterval = 0.4
    """Strength of colour jitter; not used together with auto_augment, but for policies with 3a (as in timm)."""
    color_jitter_prob: UnitInterval | None = None
    """Probability of colour jitter; null: every image."""
    grayscale_prob: UnitInterval = 0.0
    """Probability that an image is turned grey."""
    gaussian_blur_prob: UnitInterval = 0.0
    """Probability of a Gaussian blur (kernel of 23 pixels, as in timm); images must have at least 12 pixels."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """A RandAugment or AutoAugment policy in timm's notation (3a: DeiT III's three-augment); null applies none."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Resampling of the training crop; random chooses bilinear or bicubic for each image."""
    image_sizes: tuple[PositiveInt, ...] = ()
    """Sides of the training images in pixels, for example [128, 160, 224]: each optimizer step has one of them, drawn
    by the seed and its number (timm's train-img-sizes). Evaluation stays at `model.image_size`. []: only that one."""
    image_size_probs: tuple[NonNegativeFloat, ...] | None = None
    """Weights of the sizes, in the same order; null: equal ones."""
    image_size_schedule: Literal["constant", "progressive"] = "constant"
    """constant: the same probabilities in every epoch. progressive: they move from the first size to the last over
    `train.epochs`, as in timm."""
    image_size_spread: NonNegativeFloat = 0.65
    """progressive: standard deviation of the probabilities around the present size, in places of the list; 0: only the
    nearest."""
    image_size_random_mix: UnitInterval = 0.1
    """progressive: share of the steps with any of the sizes, in every epoch."""
    splits: NonNegativeInt = 0
    """Views of each image (timm's aug-splits), 0 or at least 2: a clean one and others with augmentation of their own,
    all with the same crop. `train.global_batch` and `train.micro_batch` count images, not views."""
    random_erasing: UnitInterval = 0.25
    """Probability that rectangles of an image are erased."""
    random_erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What they are filled with: noise in each pixel, one random colour, or the mean colour."""
    random_erasing_count: PositiveInt = 1
    """Maximum number of rectangles of an image; their number is random, and they share the area."""
    random_erasing_clean_split: bool = False
    """Spare the first view of each image, without splits every second image (timm's resplit)."""
    erase: Literal["before_mixing", "after_mixing"] = "before_mixing"
    """before_mixing: images are normalised, erased, then mixed, as timm does without its prefetcher. after_mixing: they
    are mixed as 8-bit values, normalised, then erased, as timm's prefetcher and the paper did."""
    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup's Beta distribution; 0 disables mixup."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix's Beta distribution; 0 disables CutMix. With both enabled, each group of images uses one."""
    cutmix_minmax: tuple[UnitInterval, UnitInterval] | None = None
    """CutMix with rectangles whose sides are between these shares of the image's, for example [0.2, 0.8]; enables
    CutMix, and `cutmix` is not used. null: by `cutmix`."""
    mixup_prob: UnitInterval = 1.0
    """Probability that a group of images is mixed."""
    mixup_switch_prob: UnitInterval = 0.5
    """Probability of CutMix, where mixup and CutMix are both enabled."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """What is mixed alike: a group of images, the two images of a pair, or nothing, each image with its own draw."""
    mixup_off_epoch: NonNegativeInt = 0
    """Number of epochs after which images are not mixed any more; 0: all are mixed."""
    mixing_group: PositiveInt = 256
    """Images of the global batch that are mixed alike in mode batch: by mixup or CutMix, with one weight and one
    rectangle. Must be even. The paper's batches had 256 images on each device."""

    @model_validator(mode="after")
    def _ranges(self) -> "AugmentationConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: the first must not be greater than the second")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale = {list(self.crop_scale)}: a crop is at most the whole image (1.0)")
        if self.cutmix_minmax is not None and self.cutmix_minmax[0] >= self.cutmix_minmax[1]:
            raise ValueError(f"cutmix_minmax = {list(self.cutmix_minmax)}: the first must be less than the second")
        return self

    @model_validator(mode="after")
    def _image_sizes(self) -> "AugmentationConfig":
        sizes, weights = self.image_sizes, self.image_size_probs
        if weights is not None and len(weights) != len(sizes):
            raise ValueError(f"image_size_probs: {len(weights)} weights for {len(sizes)} image_sizes; must be as many")
        if weights is not None and not sum(weights):
            raise ValueError(f"image_size_probs = {list(weights)}: one must be greater than 0")
        if self.image_size_schedule == "progressive" and len(sizes) < 2:
            raise ValueError(f"image_size_schedule = progressive: needs at least two image_sizes, not {list(sizes)}")
        return self

    @model_validator(mode="after")
    def _splits(self) -> "AugmentationConfig":
        if self.splits == 1:
            raise ValueError("splits = 1: must be 0 (no views) or at least 2")
        if self.splits and self.mixes:
            raise ValueError(
                f"splits = {self.splits}: views are not mixed; set mixup=0, cutmix=0 and cutmix_minmax=null"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup_prob and (self.mixup or self.cutmix or self.cutmix_minmax is not None))


class DataConfig(Section):
    """WebDataset shards and how their images become tensors."""

    train: FilePath = "data/imagenet/train"
    """Training shards: a folder of .tar files, a pattern with * or {000..146}, or an address (s3://, gs://, https://)."""
    validation: FilePath = "data/imagenet/validation"
    """Validation shards, in the same forms."""
    builtin: Literal["digits", "fashion-mnist", "idx"] | None = None
    """A data set that is written as shards to those two folders if they are missing. digits: scikit-learn's handwritten
    digits. fashion-mnist: 70,000 images of clothes, from the package dataset-fashion-mnist or from `builtin_files`.
    idx: another set in MNIST's form (MNIST, KMNIST, EMNIST) from `builtin_files`. null: the shards must exist."""
    builtin_files: FilePath | None = None
    """Folder with the four IDX files of such a set, gzipped or not; null: where the package has them."""
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
    class_map: FilePath | None = None
    """JSON file with an object that gives each class of the shards, by its name or old label, the label that it has in
    the run; several classes may have the same. For a list of names in order use `class_names`. null: labels stay."""
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
    """Per-channel mean of the normalisation; null takes that of the timm model. Of grey images (`model.in_chans=1`) it
    is the average of the three, as in timm."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Per-channel standard deviation of the normalisation, likewise."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Evaluation: side of the central crop as a fraction of the resized side; null takes that of the timm model."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """Evaluation, as timm's crop_mode: the shortest side is resized and the image cut off (center), both sides are
    (squash), or the longest one is and the rest filled with the mean colour (border); null takes that of the timm
    model."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest", "box", "hamming"] | None = None
    """Evaluation: resampling of the resize; null takes that of the timm model. fast transforms have the first two."""
    augmentation: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _builtin_goes_to_folders(self) -> "DataConfig":
        for name in ("train", "validation"):
            path = getattr(self, name)
            if self.builtin and (path.endswith(".tar") or "://" in path or set(path) & set("*?[]{}")):
                raise ValueError(f"{name} = {path!r}: builtin data sets are written to a plain folder")
        return self
