"""Keys that were renamed, so that a config of an earlier version is refused with the new name."""

from collections.abc import Mapping
from typing import Any

from scalevit.errors import UserError

# Old key -> new key, by version; CHANGELOG.md lists the same.
_RENAMED = {
    # 0.2.0
    "data.embedded": "data.builtin",
    "data.stream_samples": "data.stream_samples_per_epoch",
    "data.augmentation.repeats": "data.augmentation.aug_repeats",
    "data.augmentation.mix_probability": "data.augmentation.mixup_prob",
    "reduction.choose": "reduction.select_units",
    "train.label_smoothing": "loss.label_smoothing",
    "optimizer.betas": "optimizer.args.betas",
    "optimizer.eps": "optimizer.args.eps",
    "optimizer.clip_grad_norm": "optimizer.clip_grad",
    "optimizer.warmup_epochs": "schedule.warmup_epochs",
    "optimizer.warmup_lr": "schedule.warmup_lr",
    "optimizer.min_lr": "schedule.min_lr",
    "optimizer.lr_changes": "schedule.update",
    "ema.shared_updates_per_step": "ema.shared_parameters",
    "engine.deepspeed": "engine.native",
    "tracking.project": "tracking.wandb.project",
    "tracking.entity": "tracking.wandb.entity",
    "tracking.tags": "tracking.wandb.tags",
}


def refuse_renamed(settings: Mapping[str, Any]) -> None:
    """Finds keys of earlier versions in nested settings.

    Raises:
        UserError: one line with the old key and the new one.
    """
    for old, new in _RENAMED.items():
        if _has(settings, old.split(".")):
            raise UserError(f"config: {old} was renamed to {new}")
    tracking = settings.get("tracking")
    if isinstance(tracking, Mapping) and isinstance(tracking.get("wandb"), str):
        raise UserError(
            f"config: tracking.wandb = {tracking['wandb']!r} was renamed to tracking.wandb.enabled (true or false) and "
            "tracking.wandb.mode (online or offline)"
        )


def _has(settings: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(settings, Mapping) or key not in settings:
            return False
        settings = settings[key]
    return True
