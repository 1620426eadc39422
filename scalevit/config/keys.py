"""Every key of a config, and the key that was meant by a name from elsewhere. Must not import torch."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from scalevit.config.from_timm.table import OPTIONS
from scalevit.config.schema_fields import Schema, allowed, sections
from scalevit.config.tree import Config

# What other trainers, DeepSpeed's among them, call a setting. `_timm_names` has timm's.
_SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "gradient_clipping": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "scheduler": "schedule.name",
    "warmup": "schedule.warmup_epochs",
    "global_batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "per_device_batch_size": "train.micro_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "num_epochs": "train.epochs",
    "dtype": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "scale": "data.augmentation.crop_scale",
    "num_workers": "data.workers",
    "val": "data.validation",
    "drop_path_rate": "model.drop_path",
    "model_name": "model.name",
    "checkpoint_path": "model.initial_weights",
    "use_ema": "model.initial_weights_set",
    "fsdp": "engine.name",
    "deepspeed": "engine.name",
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
    names = list(dict.fromkeys(key.name for key in all_keys()))
    synonyms = {**_timm_names(), **_SYNONYMS}
    if leaf in synonyms:
        return synonyms[leaf]
    close = difflib.get_close_matches(leaf, map(_leaf, names), cutoff=0.8)
    for candidates in (
        [name for name in names if name.endswith(f".{given}")],
        [name for name in names if _leaf(name) == leaf],
        [name for name in names if _leaf(name) in close],
    ):
        if candidates:
            return max(candidates, key=lambda name: difflib.SequenceMatcher(None, name, given).ratio())
    return None


@cache
def _timm_names() -> dict[str, str]:
    """Keys by the options of timm's train.py that are called otherwise than any key of ours."""
    ours = {_leaf(key.name) for key in all_keys()}
    return {option.name: option.keys[0] for option in OPTIONS.values() if option.keys and option.name not in ours}


def is_free_form(name: str) -> bool:
    """Whether a key holds an object of the user's own keys, such as `model.kwargs`."""
    keys = all_keys()
    return any(key.name == name and key.is_section for key in keys) and not any(
        key.name.startswith(f"{name}.") for key in keys
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a config with its key, as on the command line."""
    for name, inner in settings.items():
        if isinstance(inner, Mapping) and inner:
            yield from flat_settings(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner
