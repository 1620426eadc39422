"""Every key of a config, and the key that was meant by a name from elsewhere. Must not import torch."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from scalevit.config.schema_fields import Schema, allowed, sections
from scalevit.config.tree import Config

# What other trainers, timm's and DeepSpeed's among them, call a setting.
_SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "lr_base": "optimizer.lr",
    "lr_base_size": "optimizer.lr_base_batch",
    "lr_base_scale": "optimizer.lr_scaling",
    "opt": "optimizer.name",
    "gradient_clipping": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "scheduler": "schedule.name",
    "sched": "schedule.name",
    "warmup": "schedule.warmup_epochs",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "per_device_batch_size": "train.micro_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "num_epochs": "train.epochs",
    "amp": "train.precision",
    "amp_dtype": "train.precision",
    "dtype": "train.precision",
    "model_dtype": "train.precision",
    "torchcompile": "train.compile",
    "torchcompile_mode": "train.compile_mode",
    "eval_metric": "evaluation.metric",
    "grad_checkpointing": "train.activation_checkpointing",
    "gradient_checkpointing": "train.activation_checkpointing",
    "log_interval": "train.log_every_steps",
    "smoothing": "loss.label_smoothing",
    "reprob": "data.augmentation.random_erasing",
    "aa": "data.augmentation.auto_augment",
    "scale": "data.augmentation.crop_scale",
    "ratio": "data.augmentation.crop_ratio",
    "num_workers": "data.workers",
    "data_dir": "data.train",
    "val": "data.validation",
    "img_size": "model.image_size",
    "input_size": "model.image_size",
    "train_img_sizes": "data.augmentation.image_sizes",
    "train_size_probs": "data.augmentation.image_size_probs",
    "train_size_schedule": "data.augmentation.image_size_schedule",
    "train_size_schedule_spread": "data.augmentation.image_size_spread",
    "train_size_random_mix": "data.augmentation.image_size_random_mix",
    "drop_path_rate": "model.drop_path",
    "model_name": "model.name",
    "checkpoint_path": "model.initial_weights",
    "initial_checkpoint": "model.initial_weights",
    "use_ema": "model.initial_weights_set",
    "model_ema": "ema.enabled",
    "model_ema_decay": "ema.decay",
    "fsdp": "engine.name",
    "deepspeed": "engine.name",
    "output": "output_dir",
    "experiment": "name",
    "val_batch_size": "evaluation.batch",
    "eval_batch_size": "evaluation.batch",
}


@dataclass(frozen=True)
class Key:
    """A setting, or a section of them."""

    name: str
    """Whole: "data.augmentation.mixup"."""
    allowed: str
    """Its values in words; "a section" for a section."""
    default: Any
    meaning: str
    only_with: str
    """What selects the section that has it, e.g. "engine.name = fsdp"; empty where there is no choice."""

    @property
    def is_section(self) -> bool:
        return self.allowed == "a section"


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, in the order of the schema; a key of several types of a section once for each."""
    schema = Config.model_json_schema()
    return tuple(_keys_of(schema, "", "", schema))


def _keys_of(section: Schema, prefix: str, only_with: str, schema: Schema) -> Iterator[Key]:
    for name, field in section["properties"].items():
        key = f"{prefix}{name}"
        types = sections(field, schema)
        if not types:
            values = f"{field['const']}" if "const" in field else allowed(field, schema)
            meaning = field.get("description") or section.get("description", "")
            yield Key(key, values, field.get("default"), " ".join(meaning.split()), only_with)
            continue
        selector = field.get("discriminator", {}).get("propertyName")
        about = field.get("description") or types[0].get("description", "")
        yield Key(key, "a section", None, " ".join(about.split()), only_with)
        for each in types:
            condition = f"{key}.{selector} = {each['properties'][selector]['const']}" if selector else only_with
            yield from _keys_of(each, f"{key}.", condition, schema)


def find_key(given: str) -> str | None:
    """The key that was probably meant by one that does not exist: in another section, without one, or another
    trainer's name for it. None if nothing is like it.

    Args:
        given: as the user wrote it, e.g. "lr", "train.lr", "learning_rate".
    """
    leaf = _leaf(given).lower()
    if leaf in _SYNONYMS:
        return _SYNONYMS[leaf]
    names = list(dict.fromkeys(key.name for key in all_keys()))
    close = difflib.get_close_matches(leaf, map(_leaf, names), cutoff=0.8)
    for candidates in (
        [name for name in names if name.endswith(f".{given}")],
        [name for name in names if _leaf(name) == leaf],
        [name for name in names if _leaf(name) in close],
    ):
        if candidates:
            return max(candidates, key=lambda name: difflib.SequenceMatcher(None, name, given).ratio())
    return None


def is_free_form(name: str) -> bool:
    """Whether a key holds an object of the user's own keys, such as `model.kwargs`."""
    keys = all_keys()
    return any(key.name == name and key.is_section for key in keys) and not any(
        key.name.startswith(f"{name}.") for key in keys
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
