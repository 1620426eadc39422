"""`scalevit checkpoint`: arguments in, library call, printing. Imports torch late."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from scalevit.cli.parsing import add_action
from scalevit.engines.deepspeed.settings import STAGES, Stage
from scalevit.errors import UserError
from scalevit.files import check_new
from scalevit.terminal import format_bytes, print_table

_SUFFIX = ".safetensors"
_INSPECT = """\
  scalevit checkpoint inspect runs/quickstart    # all checkpoints of a run
  scalevit checkpoint inspect runs/quickstart/checkpoints/step-00000100 --json"""
_CONVERT = """\
  scalevit checkpoint convert runs/quickstart weights.safetensors --ema
  scalevit checkpoint convert runs/quickstart converted/ --stage 2
  scalevit checkpoint convert converted/ weights.safetensors --config quickstart"""
EXAMPLES = f"{_INSPECT}\n{_CONVERT}"
_FORMS = """\
SOURCE and TARGET decide what is written:
  checkpoint or run folder -> NAME.safetensors   the weights (with --ema the averaged ones), for model.initial_weights
  checkpoint or run folder -> new folder         a DeepSpeed checkpoint; under torchrun, for that number of ranks
  DeepSpeed checkpoint     -> NAME.safetensors   the weights
  DeepSpeed checkpoint     -> run folder         a checkpoint from which training resumes
`scalevit export` writes models for other tools. DeepSpeed checkpoints need --config, because they do not name their
model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit checkpoint` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = add_action(actions, "inspect", "show what a checkpoint contains and whether it is intact", _INSPECT)
    inspect.add_argument("path", help="a checkpoint, or a run folder for all of its checkpoints")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run_action=_inspect)

    purpose = "export weights, or convert to and from DeepSpeed checkpoints"
    convert = add_action(actions, "convert", purpose, _CONVERT, _FORMS)
    convert.add_argument("source", metavar="SOURCE")
    convert.add_argument("target", metavar="TARGET")
    convert.add_argument("--ema", action="store_true", help="export the averaged weights")
    convert.add_argument(
        "--stage", type=int, choices=STAGES, help="ZeRO stage of the DeepSpeed checkpoint (default: 0)"
    )
    convert.add_argument("--config", help="the config of the DeepSpeed checkpoint's run")
    convert.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the config's")
    convert.set_defaults(run_action=_convert)


def run(arguments: argparse.Namespace) -> None:
    """Runs the action that the arguments name.

    Raises:
        UserError: an argument cannot be used, or a checkpoint is damaged.
    """
    arguments.run_action(arguments)


def _inspect(arguments: argparse.Namespace) -> None:
    from scalevit.checkpoint.folder import all_checkpoints
    from scalevit.checkpoint.inspection import describe

    path = Path(arguments.path)
    is_one = (path / "manifest.json").exists()
    found = [path] if is_one else all_checkpoints(path)
    if not found:
        raise UserError(f"{path}: contains no checkpoint")
    abouts = [describe(checkpoint) for checkpoint in found]
    if arguments.json:
        print(json.dumps(abouts[0] if is_one else abouts, indent=2))
    elif is_one:
        _print_one(abouts[0])
    else:
        _print_many(abouts)
    damaged = [about for about in abouts if about["damage"]]
    if damaged:
        raise UserError(f"checkpoint {damaged[-1]['path']}: {damaged[-1]['damage'][0]}")


def _convert(arguments: argparse.Namespace) -> None:
    source, target = Path(arguments.source), Path(arguments.target)
    # Both are checked before torch is loaded, which takes seconds.
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    to_file = _is_weights_file(arguments.target)
    if to_file:
        check_new(target)
    from scalevit.engines.deepspeed.checkpoints import is_deepspeed

    if is_deepspeed(source):
        _from_deepspeed(source, target, to_file, arguments)
    elif arguments.config is not None:
        raise UserError(f"--config applies only to DeepSpeed checkpoints, and {source} is not one")
    elif arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]}: settings apply only to DeepSpeed checkpoints, and {source} is not one"
        )
    elif to_file:
        _to_file(source, target, arguments)
    else:
        _to_deepspeed(source, target, arguments)


def _is_weights_file(target: str) -> bool:
    """Whether a target is a weights file, and not a folder: a name without suffix, or one that exists or ends with /.

    Raises:
        UserError: it is a file of another kind, or its folder does not exist.
    """
    path = Path(target)
    if path.suffix == _SUFFIX:
        if not path.parent.is_dir():
            raise UserError(f"{path.parent}: no such folder")
        return True
    if path.suffix and not target.endswith(os.sep) and not path.is_dir():
        raise UserError(
            f"{target}: `convert` writes {_SUFFIX} files and folders: use `scalevit export` for other forms, or end "
            f"the name of a new folder with {os.sep}"
        )
    return False


def _from_deepspeed(source: Path, target: Path, to_file: bool, arguments: argparse.Namespace) -> None:
    if arguments.config is None:
        raise UserError(f"{source} is a DeepSpeed checkpoint: give the config of its run with --config")
    if arguments.stage is not None:
        raise UserError(f"--stage applies only to DeepSpeed checkpoints that are written, and {source} is read")
    if arguments.ema:
        raise UserError(f"--ema: DeepSpeed checkpoint {source} contains no EMA weights")
    from scalevit.config.loading import load_config
    from scalevit.export.checkpoint_model import model_of_deepspeed
    from scalevit.export.deepspeed_checkpoint import read_deepspeed_run, write_checkpoint
    from scalevit.export.weights_file import write_model

    config = load_config(arguments.config, arguments.overrides)
    native = read_deepspeed_run(source, config)
    if to_file:
        write_model(*model_of_deepspeed(native, config), target)
        print(f"wrote {target}: weights of step {native.step}")
    else:
        written = write_checkpoint(native, target, config)
        print(f"wrote {written}; resume with output_dir={target.parent} name={target.name}")


def _to_file(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    if arguments.stage is not None:
        raise UserError(f"--stage applies only to DeepSpeed checkpoints: TARGET must be a folder, not a {_SUFFIX} file")
    from scalevit.checkpoint.folder import find_checkpoint
    from scalevit.export.checkpoint_model import model_of_checkpoint
    from scalevit.export.weights_file import write_model

    checkpoint = find_checkpoint(source)
    write_model(*model_of_checkpoint(checkpoint, ema=arguments.ema), target)
    print(f"wrote {target}: {'EMA' if arguments.ema else 'weights'} of {checkpoint}")


def _to_deepspeed(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    if arguments.ema:
        raise UserError("--ema needs a file as TARGET: DeepSpeed checkpoints contain no EMA weights")
    if target.exists():
        raise UserError(f"{target}: already exists; choose a new folder")
    from scalevit.checkpoint.folder import find_checkpoint
    from scalevit.distributed import World
    from scalevit.export.deepspeed_checkpoint import write_deepspeed

    checkpoint = find_checkpoint(source)
    stage: Stage = arguments.stage or 0
    world = World.from_environment()
    with world.process_group():
        write_deepspeed(checkpoint, target, stage=stage, world=world)
    if world.is_first:
        print(f"wrote {target}: {checkpoint} for DeepSpeed ZeRO-{stage}, world size {world.size}")


# --- printing ---------------------------------------------------------------------------------------------


def _print_one(about: dict[str, Any]) -> None:
    """One checkpoint, a row for each of its properties."""
    table = Table(title=about["path"], show_header=False)
    engine = about.get("engine", {})
    rows = {
        "run": about.get("name"),
        "step": _number(about.get("step")),
        "optimizer": _optimizer(about),
        "top-1 here": _percent(about.get("top1")),
        "model": f"{about['model']}, {about['reduction']}" if "model" in about else None,
        "parameters": _number(about.get("parameters")),
        "tied names": _number(about.get("tied_names")),
        "tensors": ", ".join(about.get("parts", [])),
        "written by": f"{engine.get('name')}, world size {about.get('world_size')}, {about.get('precision')}",
        "loss scale": _number(about.get("loss_scale")),
        "size": _files(about),
        "versions": ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()),
        "files": "intact, checksums agree" if not about["damage"] else "damaged: " + "; ".join(about["damage"]),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    print_table(table)


def _print_many(checkpoints: Sequence[dict[str, Any]]) -> None:
    """One row for each checkpoint of a run."""
    table = Table(title=str(Path(checkpoints[0]["path"]).parent))
    for column in ("step", "top-1", "parameters", "size", "files"):
        table.add_column(column, justify="left" if column == "files" else "right")
    for about in checkpoints:
        state = "intact" if not about["damage"] else f"damaged: {about['damage'][0]}"
        table.add_row(
            _number(about.get("step")) or Path(about["path"]).name,
            _percent(about.get("top1")),
            _number(about.get("parameters")),
            _files(about),
            state,
        )
    print_table(table)


def _optimizer(about: dict[str, Any]) -> str | None:
    scalars = ", ".join(f"{name} {value:g}" for name, value in about.get("optimizer_scalars", {}).items())
    name = about.get("optimizer")
    return f"{name}, {scalars}" if name and scalars else name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _files(about: dict[str, Any]) -> str:
    return f"{format_bytes(about['bytes'])} in {about['files']} files"
