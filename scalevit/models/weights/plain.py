"""Plain state dicts, as torch saves them: which of several sets of weights, and the names without wrappers' prefixes.

Knows the forms in which other programs save weights. Must not know models.
"""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalevit.config.model import WeightsSet
from scalevit.errors import UserError
from scalevit.models.weights.whole import cut

# Where programs keep a state dict in what they save, the first that is there: timm, DeiT, DeepSpeed, I-JEPA.
_KEYS = {"ema": ("state_dict_ema", "model_ema"), "weights": ("state_dict", "model", "module", "encoder")}
# Modules around a module, which may be around each other: leading ones of any kind, and those of torch at any place.
_LEADING = "module"
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


ONE_SET = "one set of weights, without a name"


class PlainWeights(NamedTuple):
    """A state dict of another program."""

    tensors: dict[str, Tensor]
    model: str | None
    """timm's name of the model, where its train.py has saved it beside the weights."""
    chosen: str | None
    """"weights" or "ema", where the file has both; "ema" also where it has nothing else."""


def read_plain(path: Path, source: Any, wanted: WeightsSet) -> PlainWeights:
    """Reads a state dict that torch has saved, also inside a checkpoint. Nothing that the file contains is executed.

    Args:
        source: of the weights, for messages.
        wanted: which set of weights of a checkpoint with several.

    Raises:
        UserError: the file is damaged, contains more than plain values, or has no such set.
    """
    content = _load(path, source)
    model = content.get("arch") if isinstance(content, dict) else None
    tensors, chosen = _state_dict(content, source, wanted)
    return PlainWeights(unwrapped(tensors, source), model if isinstance(model, str) else None, chosen)


def _load(path: Path, source: Any) -> Any:
    try:
        # timm's train.py saves its arguments beside the weights. Of a zip file, only what is used is read.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch names a pickle's protocol in lines of its own
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # torch does not limit the exceptions that a damaged or foreign file raises.
        if isinstance(error, EOFError) or "unexpected EOF" in str(error):  # of a pickle, which does not say its length
            raise cut(source) from error
        raise UserError(f"weights {source}: cannot be read ({why_unreadable(error)})") from error


def why_unreadable(error: BaseException) -> str:
    """Why a file that torch has saved was not read, in one line.

    torch refuses to execute code by an `UnpicklingError`, whose text advises to load the file with
    `weights_only=False`; so does timm, by an error that it causes.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, pickle.UnpicklingError):
            return "it is damaged, or contains more than tensors: save model.state_dict()"
        cause = cause.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _state_dict(content: Any, source: Any, wanted: WeightsSet) -> tuple[dict[str, Tensor], str | None]:
    sets: dict[str, Mapping[Any, Any]] = {}
    if isinstance(content, dict):
        for name, keys in _KEYS.items():
            found = [content[key] for key in keys if isinstance(content.get(key), dict)]
            if found:
                sets[name] = found[0]
    if wanted != "auto" and wanted not in sets:
        raise no_such_set(source, wanted, f"only {' and '.join(sets)}" if sets else ONE_SET)
    chosen = wanted if wanted != "auto" else next((name for name in _KEYS if name in sets), None)
    tensors = content if chosen is None else sets[chosen]
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise UserError(f"weights {source}: holds no state dict")
    named = chosen if len(sets) > 1 or chosen == "ema" else None
    return {str(name): tensor for name, tensor in tensors.items()}, named


def no_such_set(source: Any, wanted: WeightsSet, held: str) -> UserError:
    """The error where a file does not have the wanted set of weights, but `held`."""
    return UserError(
        f"weights {source}: model.initial_weights_set = {wanted!r}, but the file has {held}: leave it at 'auto'"
    )


def unwrapped(tensors: Mapping[str, Tensor], source: Any) -> dict[str, Tensor]:
    """The tensors under the names that they have without DDP, FSDP, `torch.compile` and recomputation.

    Raises:
        UserError: two tensors would have one name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = ".".join(_without_wrappers(name))
        if own in result:
            raise UserError(f"weights {source}: has two tensors {own}, with and without the prefix of a wrapper")
        result[own] = tensor
    return result


def _without_wrappers(name: str) -> Iterator[str]:
    leading = True
    for part in name.split("."):
        leading = leading and (part == _LEADING or part in _WRAPPERS)
        if not leading and part not in _WRAPPERS:
            yield part
