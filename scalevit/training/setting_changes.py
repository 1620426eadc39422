"""Settings that differ between a run's checkpoint and this start, and which of them need the user's consent.

A setting may be given while what it belongs to is off. It then has no effect, and may change when a run resumes.

Knows configs as plain JSON values; must not know checkpoints or folders.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from scalevit.config.loading import validate
from scalevit.errors import UserError

Changes = dict[str, tuple[Any, Any]]
"""By config key: the value before and the value now."""

# The result of a run depends on these. What the other settings change is speed, output or where files lie; the model's
# structure, the seed and the data must not change at all (`resume.check_same_run`, `check_fingerprint`).
_OF_THE_RESULT = (
    "optimizer",
    "schedule",
    "loss",
    "task",
    "ema",
    "evaluation.metric",
    "evaluation.every_epochs",
    "data.augmentation",
    "data.transforms",
    "data.validation",
    "data.crop_pct",
    "data.crop_mode",
    "data.interpolation",
    "data.class_map",
    "data.exif_orientation",
    "data.mean",
    "data.std",
    "model.drop_path",
    "model.drop_path_mode",
    "train.epochs",
)
# Of these sections, but not of the result: where a teacher is read from (its digest is compared), and how it is held.
_OF_SPEED = ("task.teacher.weights", "task.teacher.sharded")
# The optimizer's state is of the parameters that are trained.
_FIXED = ("optimizer.frozen", "optimizer.layer_decay_no_opt_scale")


def _mixes_images(config: Mapping[str, Any]) -> bool:
    augmentation = config["data"]["augmentation"]
    return augmentation["mixup_prob"] > 0 and any(augmentation[key] for key in ("mixup", "cutmix", "cutmix_minmax"))


def _has_timms_order(config: Mapping[str, Any]) -> bool:
    return bool(config["data"]["augmentation"]["repeat_order"] == "timm")


# Of the result only where a whole config fulfils the condition.
_ONLY_WITH: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool]], ...] = (
    (("evaluation.every_epochs",), lambda config: config["schedule"]["name"] == "plateau"),
    (("schedule.warmup_lr",), lambda config: config["schedule"]["warmup_epochs"] > 0),
    (("optimizer.clip_mode",), lambda config: config["optimizer"]["clip_grad"] is not None),
    (("optimizer.lr_scaling",), lambda config: config["optimizer"]["lr_base_batch"] is not None),
    (
        ("optimizer.layer_decay_min_scale", "optimizer.layer_decay_shared"),
        lambda config: config["optimizer"]["layer_decay"] is not None,
    ),
    (("ema",), lambda config: config["ema"]["enabled"]),
    (("ema.warmup_gamma", "ema.warmup_power"), lambda config: config["ema"]["warmup"]),
    (
        tuple(f"data.augmentation.random_erasing_{name}" for name in ("mode", "count", "clean_split")),
        lambda config: config["data"]["augmentation"]["random_erasing"] > 0,
    ),
    (("data.augmentation.repeat_processes",), _has_timms_order),
    (("data.augmentation.mixing_group",), lambda config: _has_timms_order(config) or _mixes_images(config)),
    (
        tuple(f"data.augmentation.{name}" for name in ("mixup_switch_prob", "mixup_mode", "mixup_off_epoch", "erase")),
        _mixes_images,
    ),
)
# They say how to resume.
_IGNORED = ("train.resume", "train.resume_changes")
OF_THE_FOLDER = (
    "name",
    "output_dir",
    "tracking",
    "data.workers",
    "data.max_faults",
    "data.cache",
    "data.cache_gb",
    "train.checkpoint",
    "train.log_every_steps",
    "train.profile",
    "train.profile_after",
    "train.profile_steps",
    "evaluation.batch",
    "evaluation.examples",
    *_IGNORED,
)
"""Settings and sections of where a run is, how its images are read and what is kept of it: neither its result nor the
speed of its steps depends on them."""
_OF_THE_MACHINE = (
    *OF_THE_FOLDER,
    "kernels",
    "engine",
    "train.micro_batch",
    "train.channels_last",
    "train.activation_checkpointing",
    "train.compile",
    "train.compile_mode",
    "train.meta_init",
)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The settings that differ between two whole configs.

    Args:
        before: plain JSON values, perhaps of an older version; settings that it did not have were at their defaults.
        now: plain JSON values.
    """
    earlier = _completed(before) or before
    return {key: (old, new) for key, old, new in _differences(earlier, now) if key not in _IGNORED}


def effective_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """As `changed_settings`, without those that have an effect in neither of the configs."""
    changes, earlier = changed_settings(before, now), _completed(before)
    if earlier is None:
        return changes
    idle = [key for keys, has_effect in _ONLY_WITH if not (has_effect(earlier) or has_effect(now)) for key in keys]
    return {key: change for key, change in changes.items() if not is_under(key, idle)}


def _completed(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """With the defaults of settings that it does not have; None for settings that this version does not take."""
    with suppress(UserError):
        return validate(dict(config)).model_dump(mode="json")
    return None


def without_the_machines(changes: Changes, *others: str) -> Changes:
    """The changes that make runs which cannot be compared.

    Args:
        others: keys or sections that may differ besides.
    """
    return {key: values for key, values in changes.items() if not is_under(key, (*_OF_THE_MACHINE, *others))}


def changed_fingerprint(before: Mapping[str, str], now: Mapping[str, str]) -> Changes:
    """What differs between two fingerprints of a task (`TaskRunner.fingerprint`), by keys of the task's section."""
    return {f"task.{key}": (old, new) for key, old, new in _differences(before, now)}


def check_changes(changes: Changes, allowed: Literal["allow", "refuse"] | Sequence[str], where: str) -> None:
    """Refuses changes that make another run of a resumed one.

    Args:
        changes: of all settings.
        allowed: `train.resume_changes`: "allow" for all, or the keys or sections that may change.
        where: what holds the settings before, for the message.

    Raises:
        UserError: a setting that the result depends on has changed; names all of them. Or one that never may change.
    """
    if "bf16-weights" in (kinds := changes.get("train.precision", ())):
        raise UserError(
            f"{where}: cannot be resumed with weights of another type (train.precision: {' -> '.join(kinds)}): choose "
            "another name, and start from its weights by model.initial_weights"
        )
    for key, text in zip(changes, described(changes), strict=True):
        if key in _FIXED:
            raise UserError(
                f"{where}: cannot be resumed with other parameters frozen ({text}): choose another name, and start "
                "from its weights by model.initial_weights"
            )
    if allowed == "allow":
        return
    named = () if allowed == "refuse" else tuple(allowed)
    free = (*_OF_SPEED, *named)
    refused = [key for key in changes if is_under(key, _OF_THE_RESULT) and not is_under(key, free)]
    if refused:
        listed = "; ".join(described({key: changes[key] for key in refused}))
        raise UserError(
            f"{where}: its results depend on settings that have changed ({listed}): undo that, choose another name, or "
            f"allow it by train.resume_changes='{json.dumps(refused)}' (or allow, for all)"
        )


def described(changes: Changes) -> list[str]:
    """Each as "key: before -> now", values as JSON."""
    return [f"{key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changes.items()]


def is_under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether a key is one of these, or in a section that is."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, before, now
