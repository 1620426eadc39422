"""timm's options of augmentation, regularisation and the loss, in the order of its train.py."""

from scalevit.config.from_timm.option import (
    SWITCH,
    integer,
    key,
    not_kept,
    not_needed,
    number,
    numbers,
    replaced,
    text,
)

_DATA = "data.augmentation"
_NORMS = "models with batch norms are refused, because results would depend on the ranks"


def _or_zero(value: float | None) -> float:
    return value or 0.0


AUGMENTATION_OPTIONS = (
    replaced(
        "--no-aug",
        SWITCH,
        f"{_DATA}.crop_scale {_DATA}.crop_ratio {_DATA}.hflip {_DATA}.vflip {_DATA}.color_jitter "
        f"{_DATA}.auto_augment {_DATA}.random_erasing {_DATA}.interpolation",
        "the central square of each image, resized; no flip, jitter, policy or erasing. Mixing stays, as in timm",
    ),
    key(
        "--train-crop-mode",
        text(None, "rrc", "rkrc", "rkrr"),
        f"{_DATA}.crop_mode",
        convert=lambda mode: mode or "rrc",
    ),
    key("--scale", numbers(0.08, 1.0), f"{_DATA}.crop_scale"),
    key("--ratio", numbers(3 / 4, 4 / 3), f"{_DATA}.crop_ratio"),
    key("--hflip", number(0.5), f"{_DATA}.hflip"),
    key("--vflip", number(0.0), f"{_DATA}.vflip"),
    key("--color-jitter", number(0.4), f"{_DATA}.color_jitter"),
    key("--color-jitter-prob", number(), f"{_DATA}.color_jitter_prob"),
    key("--grayscale-prob", number(), f"{_DATA}.grayscale_prob", convert=_or_zero),
    key("--gaussian-blur-prob", number(), f"{_DATA}.gaussian_blur_prob", convert=_or_zero),
    key("--aa", text(), f"{_DATA}.auto_augment", convert=lambda policy: policy or None),
    replaced("--aug-repeats", number(0), f"{_DATA}.aug_repeats", "0 is 1 copy; fractions are not kept"),
    key("--aug-splits", integer(0), f"{_DATA}.splits"),
    replaced("--jsd-loss", SWITCH, "loss.name", "jsd"),
    replaced("--bce-loss", SWITCH, "loss.name", "bce, where images are mixed or labels smoothed, as in timm"),
    replaced("--bce-sum", SWITCH, "loss.sum_classes", "of bce", needs="bce_loss"),
    replaced("--bce-target-thresh", number(), "loss.target_threshold", "of bce", needs="bce_loss"),
    replaced("--bce-pos-weight", number(), "loss.positive_weight", "of bce", needs="bce_loss"),
    key("--reprob", number(0.0), f"{_DATA}.random_erasing"),
    key("--remode", text("pixel", "pixel", "rand", "const"), f"{_DATA}.random_erasing_mode"),
    key("--recount", integer(1), f"{_DATA}.random_erasing_count"),
    key("--resplit", SWITCH, f"{_DATA}.random_erasing_clean_split"),
    key("--mixup", number(0.0), f"{_DATA}.mixup"),
    key("--cutmix", number(0.0), f"{_DATA}.cutmix"),
    key("--cutmix-minmax", numbers(), f"{_DATA}.cutmix_minmax"),
    key("--mixup-prob", number(1.0), f"{_DATA}.mixup_prob"),
    key("--mixup-switch-prob", number(0.5), f"{_DATA}.mixup_switch_prob"),
    key("--mixup-mode", text("batch", "batch", "pair", "elem"), f"{_DATA}.mixup_mode"),
    key("--mixup-off-epoch", integer(0), f"{_DATA}.mixup_off_epoch"),
    replaced("--smoothing", number(0.1), "loss.label_smoothing", "of the loss that is chosen"),
    replaced(
        "--train-interpolation",
        text("random"),
        f"{_DATA}.interpolation",
        "random, bilinear and bicubic; an empty name is the model's",
    ),
    replaced("--drop", number(0.0), "model.kwargs", "as `drop_rate`"),
    not_kept("--drop-connect", number(), "timm's trainer does not use it any more: give `--drop-path`", neutral=(0.0,)),
    replaced("--drop-path", number(), "model.drop_path", "timm's default of the model if not given: 0 for ViTs"),
    not_kept("--drop-block", number(), "is of convolutional networks", neutral=(0.0,)),
)

NORM_OPTIONS = (
    not_kept("--bn-momentum", number(), _NORMS),
    not_kept("--bn-eps", number(), _NORMS),
    not_needed("--sync-bn", SWITCH, _NORMS),
    not_needed("--dist-bn", text("reduce"), _NORMS),
    not_kept("--split-bn", SWITCH, _NORMS),
)
