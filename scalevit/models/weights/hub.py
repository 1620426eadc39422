"""Finds the file of initial weights: by a path, a folder of the Hugging Face form, a name of the hub or of timm.

Files of the hub come from its cache, else they are downloaded: once, however many ranks of a machine ask. Knows where
files are and what is written beside them. Must not read tensors.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from scalevit.errors import UserError, nearest_hint
from scalevit.files import locked, writing_whole

SCHEMES = ("timm", "hf-hub", "local-dir")
"""Before the colon of an address: timm's pretrained models, models of the hub, and folders of the same form."""
_EXAMPLES = {"timm": "vit_base_patch16_224", "hf-hub": "ORG/NAME", "local-dir": "FOLDER"}

CONFIG = "config.json"
# The names under which timm looks for the weights of a folder or a model of the hub, the first that exists.
_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)

_PROGRAMS = {".onnx": "onnx", ".pt2": "torch"}
"""By suffix: forms of `scalevit export` that have no state dict."""

Source = str | os.PathLike[str]
"""Of weights: a path, or an address that starts with one of `SCHEMES`."""


class WeightsFile(NamedTuple):
    """A file of weights on this machine, and what is known of it from elsewhere."""

    path: Path
    model: str | None = None
    """timm's name of the model, with the arguments of its factory if there are any."""
    classes: tuple[str, ...] | None = None
    """Names of the classifier's outputs."""


def is_address(source: Source) -> bool:
    """Whether weights are named by an address and not by a path."""
    scheme, colon, _ = os.fspath(source).partition(":")
    return bool(colon) and scheme in SCHEMES


def find_weights(source: Source) -> WeightsFile:
    """The file that a path or an address stands for. Downloads it if it must.

    Raises:
        UserError: there is none, or it can neither be found in the hub's cache nor downloaded.
    """
    if not is_address(source):
        path = Path(source)
        if path.is_dir():
            return _in_folder(source, path)
        if not path.is_file():
            raise UserError(f"weights {source}: no such file{_scheme_hint(source)}")
        if path.suffix in _PROGRAMS:
            form = _PROGRAMS[path.suffix]
            raise UserError(f"weights {source}: is an export (--to {form}): name the run or its weights")
        return WeightsFile(path)
    scheme, _, name = os.fspath(source).partition(":")
    if not name:
        raise UserError(f"weights {source}: names nothing after the colon, e.g. {scheme}:{_EXAMPLES[scheme]}")
    if scheme == "local-dir":
        if not Path(name).is_dir():
            raise UserError(f"weights {source}: no such folder")
        return _in_folder(source, Path(name))
    if scheme == "hf-hub":
        described = _description(source, _from_hub(source, name, [CONFIG]))
        return WeightsFile(_from_hub(source, name, _NAMES), *described)
    return _pretrained(source, name)


def _scheme_hint(source: Source) -> str:
    scheme, colon, _ = os.fspath(source).partition(":")
    return nearest_hint(scheme, SCHEMES, cutoff=0.4) if colon else ""


def _in_folder(source: Source, folder: Path) -> WeightsFile:
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".pth", ".bin"))
    described = _description(source, folder / CONFIG) if (folder / CONFIG).is_file() else None
    if described is None or described[0] is None:
        named = f": name a file, e.g. {folder / files[0]}" if files else ""
        raise UserError(f"weights {source}: a folder without a {CONFIG} of timm, which names the architecture{named}")
    for name in [*_NAMES, *files]:
        if (folder / name).is_file():
            return WeightsFile(folder / name, *described)
    raise UserError(f"weights {source}: the folder has no file of weights, such as {_NAMES[0]}")


def _description(source: Source, path: Path) -> tuple[str | None, tuple[str, ...] | None]:
    """The model and the classes that a config.json of timm names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"weights {source}: {path.name} cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return None, None
    arguments = content.get("model_args") or {}
    model = " ".join([content["architecture"], *(f"{key}={value}" for key, value in arguments.items())])
    names, outputs = _labels(content.get("label_names") or content.get("labels")), content.get("num_classes")
    if names is not None and outputs and len(names) != outputs:
        raise UserError(f"weights {source}: {path.name} has {len(names)} label_names, but num_classes = {outputs}")
    return model, names


def _labels(names: Any) -> tuple[str, ...] | None:
    """Names by label, of a list or of an object {"0": ...}; None where there are gaps."""
    if isinstance(names, dict):
        names = [names.get(str(label)) for label in range(len(names))]
    if not isinstance(names, list) or any(name is None for name in names):
        return None
    return tuple(str(name) for name in names)


def _pretrained(source: Source, name: str) -> WeightsFile:
    """timm's pretrained weights of a model, with or without a tag."""
    architecture, _, _ = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest_hint(architecture, timm.list_models(), cutoff=0.3)
        raise UserError(f"weights {source}: {architecture} is not a timm model{hint}")
    own = timm.list_pretrained(f"{architecture}.*")
    known = name == architecture or name in timm.list_models(f"{architecture}.*", include_tags=True)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if known else None
    if config is None or not (config.hf_hub_id or config.url):
        choice = f"; it has {', '.join(own)}" if own else ""
        raise UserError(f"weights {source}: timm has no such pretrained weights of {architecture}{choice}")
    if config.hf_hub_id:
        names = [config.hf_hub_filename] if config.hf_hub_filename else _NAMES
        return WeightsFile(_from_hub(source, config.hf_hub_id, names), name)
    return WeightsFile(_from_address(source, str(config.url)), name)


def _from_hub(source: Source, repository: str, names: Sequence[str]) -> Path:
    """The first of some files of a model of the hub, `ORG/NAME` or `ORG/NAME@REVISION`: cached, else downloaded."""
    identifier, _, revision = repository.partition("@")
    chosen = revision or None
    try:
        for name in names:
            cached = huggingface_hub.try_to_load_from_cache(identifier, name, revision=chosen)
            if isinstance(cached, str):
                return Path(cached)
        with _quiet_hub():
            for name in names:
                try:
                    return Path(huggingface_hub.hf_hub_download(identifier, name, revision=chosen))
                except LocalEntryNotFoundError:  # also an EntryNotFoundError: the hub cannot be reached
                    raise
                except EntryNotFoundError:
                    continue
    except HFValidationError as error:
        raise UserError(f"weights {source}: {repository} is not a name such as ORG/NAME ({error})") from error
    except OSError as error:  # includes all that the hub and the connection to it report
        raise UserError(_unreachable(source, huggingface_hub.constants.HF_HUB_CACHE, error)) from error
    raise UserError(f"weights {source}: the hub's {identifier} has no {' or '.join(names)}")


def _from_address(source: Source, url: str) -> Path:
    """A file of the web in torch's cache, where timm looks for it too."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{path.name}.lock"):
            if not path.is_file():  # another rank has downloaded it since
                with writing_whole(path) as temporary:
                    torch.hub.download_url_to_file(url, str(temporary), progress=False)
    except OSError as error:
        raise UserError(_unreachable(source, str(folder), error)) from error
    return path


def _unreachable(source: Source, cache: str, error: OSError) -> str:
    cause = error.__cause__ or error  # the hub's own text says only that there is no connection
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
    return (
        f"weights {source}: not in the cache {cache}, and cannot be downloaded ({reason}): on a machine without "
        "network, name a file in model.initial_weights, or copy the cache"
    )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's progress bars and warnings, which every rank would print."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    silent, level = are_progress_bars_disabled(), logging.get_verbosity()
    if not silent:
        disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not silent:
            enable_progress_bars()
