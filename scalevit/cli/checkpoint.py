"""`scalevit checkpoint`: the arguments and what they do; `scalevit.cli.main` mounts them. Imports torch late."""

import argparse
import json
from pathlib import Path

from scalevit.errors import UserError

_CONVERT = """\
What is made follows from SOURCE and TARGET:
  checkpoint or run folder -> NAME.safetensors   the weights alone (with --ema its averages), for any tool
  checkpoint or run folder -> folder             DeepSpeed's own form; under torchrun for as many ranks
  DeepSpeed's folder       -> NAME.safetensors   the weights alone
  DeepSpeed's folder       -> run folder         a checkpoint that launch/train.py goes on from
DeepSpeed's folders need --config: they do not say what model they hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit checkpoint` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="what a checkpoint holds, and whether it is whole")
    inspect.add_argument("path", help="a checkpoint, or a run folder for all of its checkpoints")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run_action=_inspect)

    convert = actions.add_parser(
        "convert",
        help="to a weights file, and to and from DeepSpeed's own form",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", metavar="SOURCE")
    convert.add_argument("target", metavar="TARGET")
    convert.add_argument("--ema", action="store_true", help="the averaged weights instead of the last ones")
    convert.add_argument("--stage", type=int, choices=range(4), help="ZeRO stage of DeepSpeed's form (default: 0)")
    convert.add_argument("--config", help="of the model in DeepSpeed's folder")
    convert.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the config's")
    convert.set_defaults(run_action=_convert)


def run(arguments: argparse.Namespace) -> None:
    """Does what the arguments of `add_arguments` say.

    Raises:
        UserError: what the user gave cannot be used, or a checkpoint is damaged.
    """
    arguments.run_action(arguments)


def _inspect(arguments: argparse.Namespace) -> None:
    from scalevit.checkpoint.convert import all_checkpoints
    from scalevit.checkpoint.inspection import describe, print_many, print_one

    path = Path(arguments.path)
    alone = (path / "manifest.json").exists()
    found = [path] if alone else all_checkpoints(path)
    if not found:
        raise UserError(f"{path}: holds no checkpoint")
    abouts = [describe(checkpoint) for checkpoint in found]
    if arguments.json:
        print(json.dumps(abouts[0] if alone else abouts, indent=2))
    elif alone:
        print_one(abouts[0])
    else:
        print_many(abouts)
    damaged = [about for about in abouts if about["damage"]]
    if damaged:
        raise UserError(f"checkpoint {damaged[-1]['path']}: {damaged[-1]['damage'][0]}")


def _convert(arguments: argparse.Namespace) -> None:
    from scalevit.engines.deepspeed.checkpoints import is_deepspeed

    source, target = Path(arguments.source), Path(arguments.target)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if is_deepspeed(source):
        _from_deepspeed(source, target, arguments)
    elif arguments.config is not None:
        raise UserError(f"--config is for checkpoints of DeepSpeed's, which {source} is not")
    else:
        _from_ours(source, target, arguments)


def _from_deepspeed(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    if arguments.config is None:
        raise UserError(f"{source} is a checkpoint of DeepSpeed's: name its config with --config")
    if arguments.ema:
        raise UserError(f"{source} is a checkpoint of DeepSpeed's, which has no EMA")
    from scalevit.checkpoint.convert import from_deepspeed, native_to_checkpoint, native_to_weights
    from scalevit.config.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    native = from_deepspeed(source, config)
    if target.suffix == ".safetensors":
        native_to_weights(native, target, config)
        print(f"wrote {target}: weights of step {native.step}")
    else:
        written = native_to_checkpoint(native, target, config)
        print(f"wrote {written}; train on with output_dir={target.parent} name={target.name}")


def _from_ours(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    from scalevit.checkpoint.convert import find_checkpoint, to_deepspeed, to_weights

    checkpoint = find_checkpoint(source)
    if target.suffix == ".safetensors":
        if arguments.stage is not None:
            raise UserError("--stage is of DeepSpeed's form: name a folder as TARGET, not a .safetensors file")
        to_weights(checkpoint, target, ema=arguments.ema)
        print(f"wrote {target}: {'EMA' if arguments.ema else 'weights'} of {checkpoint}")
        return
    if arguments.ema:
        raise UserError("--ema makes a .safetensors file: DeepSpeed's form has no EMA")
    if target.exists():
        raise UserError(f"{target}: exists already; name a new folder")
    from scalevit.distributed import World

    world = World.from_environment()
    with world.process_group():
        to_deepspeed(checkpoint, target, stage=arguments.stage or 0, world=world)
    if world.is_first:
        print(f"wrote {target}: {checkpoint} for DeepSpeed ZeRO-{arguments.stage or 0}, world size {world.size}")
