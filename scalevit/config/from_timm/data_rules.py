"""Options that are looked at together, for the keys of the data, the batch and the run's name and evaluations."""

import os
import re
import shlex

from scalevit.config.from_timm.conversion import Conversion, ModelFacts
from scalevit.config.from_timm.table import OPTIONS

_AUGMENTATION = "data.augmentation"
_SPLITS = {"train": "train_split", "validation": "val_split"}
_WITH_AUGMENTATION = (
    *("train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob"),
    *("gaussian_blur_prob", "aa", "reprob", "remode", "recount", "resplit", "train_interpolation"),
)
_FOLDERS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
_WITH_COLUMNS = ("hfds", "hfids")
_INTERPOLATIONS = ("random", "bilinear", "bicubic")


def run_name(conversion: Conversion) -> None:
    """A name of the model's family and the reduction, as in our presets: vit_base_grouped."""
    arguments = conversion.arguments
    family = re.sub(r"_patch\d.*|\..*", "", arguments["model"].rpartition("/")[2])
    strategy = arguments["reduction_strategy"] or "baseline"
    conversion.set("name", re.sub(r"[^A-Za-z0-9._-]", "_", f"{family}_{strategy}"), "model")


def batch(conversion: Conversion, processes: int) -> None:
    """The global batch, and the images that are mixed alike: one pass of one process."""
    arguments = conversion.arguments
    images = arguments["batch_size"]
    total = images * processes * max(1, arguments["grad_accum_steps"])
    conversion.set("train.global_batch", total, "batch_size", "grad_accum_steps")
    if _mixes(conversion):
        conversion.set(f"{_AUGMENTATION}.mixing_group", images, "batch_size")
    if conversion.exact:
        conversion.set("train.micro_batch", images, "batch_size")
        conversion.set("evaluation.batch", arguments["validation_batch_size"] or images, "batch_size")


def _mixes(conversion: Conversion) -> bool:
    settings = conversion.settings
    names = ("mixup", "cutmix", "cutmix_minmax")
    return any(settings[f"{_AUGMENTATION}.{name}"] for name in names)


def augmentation(conversion: Conversion, processes: int, facts: ModelFacts) -> None:
    """Repeats, interpolation, no augmentation at all, and what timm does without an option."""
    arguments = conversion.arguments
    repeats = arguments["aug_repeats"]
    if repeats != int(repeats):
        conversion.left_out(OPTIONS["aug_repeats"], "not kept: copies are whole; 1 is taken")
        repeats = 0
    conversion.set(f"{_AUGMENTATION}.aug_repeats", int(repeats) or 1, "aug_repeats")
    interpolation = arguments["train_interpolation"]
    if arguments["no_aug"]:
        _no_augmentation(conversion)
    if arguments["no_aug"] or not interpolation:
        interpolation = arguments["interpolation"] or facts.interpolation
    if interpolation in _INTERPOLATIONS:
        conversion.set(f"{_AUGMENTATION}.interpolation", interpolation, "train_interpolation", "no_aug")
    else:
        conversion.lines.append(
            f"--train-interpolation {interpolation}: not kept: training images are resized as "
            f"{', '.join(_INTERPOLATIONS)}; random is taken"
        )
    if facts.crop_mode != "center":
        conversion.set("data.crop_mode", "center")  # timm's trainer gives its loader no other
    conversion.differs("data.exif_orientation", False, "does not turn images as their EXIF records say")
    if repeats > 1:
        conversion.differs(f"{_AUGMENTATION}.repeat_order", "timm", "spreads the copies of an image over the processes")
        if conversion.exact:
            conversion.set(f"{_AUGMENTATION}.repeat_processes", processes)
    if _mixes(conversion) and conversion.settings[f"{_AUGMENTATION}.random_erasing"]:
        if arguments["no_prefetcher"]:
            conversion.set(f"{_AUGMENTATION}.erase", "before_mixing", "no_prefetcher")
        else:
            conversion.differs(f"{_AUGMENTATION}.erase", "after_mixing", "erases after mixing, with its prefetcher")


def _no_augmentation(conversion: Conversion) -> None:
    """A crop of all of the area and of aspect ratio 1 is the central square, as timm's resize and central crop."""
    conversion.has_no_effect(_WITH_AUGMENTATION, "beside --no-aug")
    for name, value in {
        "crop_mode": "rrc",
        "crop_scale": [1.0, 1.0],
        "crop_ratio": [1.0, 1.0],
        "hflip": 0.0,
        "vflip": 0.0,
        "color_jitter": 0.0,
        "grayscale_prob": 0.0,
        "gaussian_blur_prob": 0.0,
        "auto_augment": None,
        "random_erasing": 0.0,
    }.items():
        conversion.set(f"{_AUGMENTATION}.{name}", value, "no_aug")


# --- the data set -----------------------------------------------------------------------------------------


def data_set(conversion: Conversion) -> None:
    """Where the shards are, or the commands that write them."""
    arguments = conversion.arguments
    root = arguments["data_dir"] or arguments["data"]
    if arguments["data_dir"]:
        conversion.has_no_effect(["data"], "beside --data-dir")
    splits = {part: arguments[option] for part, option in _SPLITS.items()}
    if not splits["validation"]:
        conversion.lines.append("--val-split '': not kept: a run has validation images")
        splits["validation"] = "validation"
    kind, _, name = arguments["dataset"].partition("/")
    _label_key(conversion, kind)
    if kind == "wds" and root:
        for part, split in splits.items():
            conversion.set(f"data.{part}", _shards(root, split), "data_dir", _SPLITS[part])
    else:
        folder = re.sub(r"[^\w.-]", "_", os.path.basename((root or "").rstrip("/")) or name) or "imagenet"
        for part in splits:
            conversion.set(f"data.{part}", f"data/{folder}/{part}", "data_dir")
        _say_how_to_write(conversion, kind, name, root, splits)
    if class_map := arguments["class_map"]:
        if class_map.endswith(".txt"):
            conversion.set("data.class_names", class_map, "class_map")
        else:
            reason = "not kept: pickles are not read; data.class_map takes a JSON object of names and labels"
            conversion.left_out(OPTIONS["class_map"], reason)


def _label_key(conversion: Conversion, kind: str) -> None:
    """Of the labels in timm's shards; the command that writes others has the column."""
    option = OPTIONS["target_key"]
    key = conversion.arguments["target_key"]
    if not key or (kind in _WITH_COLUMNS and "," not in key):
        return
    if "," in key:
        conversion.left_out(option, "not kept: an image has one label")
    elif kind == "wds":
        conversion.set("data.label_key", key, "target_key")
        conversion.left_out(option, f"data.label_key={key} is used where shards have no .cls members, which come first")
    elif kind:
        conversion.left_out(option, "not kept: the labels are named when the shards are written")
    else:
        conversion.has_no_effect(["target_key"], "with a folder of images")


def _columns(conversion: Conversion) -> str:
    """Options of `scalevit shards write` for columns that are not timm's default."""
    given = {"image": conversion.arguments["input_key"], "label": conversion.arguments["target_key"]}
    named = {column: key for column, key in given.items() if key and "," not in key}
    return "".join(f" --{column}-column {shlex.quote(key)}" for column, key in named.items() if key != column)


def _shards(root: str, split: str) -> str:
    """A split of timm's WebDataset reader: a pattern of shards with perhaps their count, or a name in `_info.json`."""
    pattern = split.partition("|")[0]
    if "tar" not in pattern and ".." not in pattern:
        pattern = f"*{pattern}*.tar"
    return f"{root.rstrip('/')}/{pattern}"


def _say_how_to_write(conversion: Conversion, kind: str, name: str, root: str | None, splits: dict[str, str]) -> None:
    settings = conversion.settings
    if not kind:
        folders = {part: _folder(root or "", split) for part, split in splits.items()}
        sources = {part: f"--source {shlex.quote(folder)} --class-order natural" for part, folder in folders.items()}
        what = "a folder of images" if root else "no data set"
    elif kind in _WITH_COLUMNS:
        written = f"--datasets {shlex.quote(name)}{_columns(conversion)}"
        sources = {part: f"{written} --split {shlex.quote(split)}" for part, split in splits.items()}
        what = f"--dataset {kind}/{name}"
    else:
        conversion.lines.append(
            f"--dataset {kind}/{name}: not kept: images are read from shards; `scalevit shards write --help` lists "
            f"what they are written from; data.train={settings['data.train']} is a placeholder"
        )
        return
    if not root and not kind:
        conversion.lines.append(f"no data set is named: data.train={settings['data.train']} is a placeholder")
        return
    for part, source in sources.items():
        command = f"scalevit shards write {source} --destination {settings[f'data.{part}']}"
        conversion.lines.append(f"{what}: images are read from shards: {command}")


def _folder(root: str, split: str) -> str:
    """The folder of a split, which timm also finds under another usual name."""
    names = [split, *next((names for names in _FOLDERS if split in names), ())]
    paths = [os.path.join(root, name) for name in names]
    return next(filter(os.path.isdir, paths), paths[0])
