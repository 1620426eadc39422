"""`scalevit from-timm`: turns a command of timm's train.py into a config. Arguments, library calls and printing."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.cli.parsing import integer
from scalevit.errors import SettingError, UserError, nearest_hint
from scalevit.files import check_writable, write_whole

if TYPE_CHECKING:
    from scalevit.config.from_timm.conversion import ModelFacts
    from scalevit.config.tree import Config
    from scalevit.engines.settings import EngineSettings

EXAMPLES = """\
  scalevit from-timm "torchrun --nproc_per_node=4 train.py /data --model vit_small_patch16_224 --opt adamw --lr 1e-3"
  scalevit from-timm output/train/vit_small/args.yaml --gpus 4 --output small.json
  scalevit from-timm "./distributed_train.sh 2 /data --model vit_base_patch16_224 --amp" --exact
  scalevit from-timm --markdown > from-timm.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}\n\nLines on the standard error name each option that the config does not keep."
    )
    parser.add_argument(
        "command", nargs="?", help="the command in quotes, or the args.yaml that timm wrote into its output folder"
    )
    parser.add_argument("--gpus", type=integer(1), help="number of processes (default: that of the command)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="also write what timm does where scalevit has another default (fp16, erasing after mixing, ...), and what "
        "belongs to the machine and the run's folder (name, workers, ...)",
    )
    parser.add_argument("--output", help="a new file for the config (default: standard output)")
    parser.add_argument("--markdown", action="store_true", help="print a table of all options of timm instead")


def run(arguments: argparse.Namespace) -> None:
    """Prints or writes the config, and prints what it does not keep.

    Raises:
        UserError: an unknown option, a value that is not valid, or the file exists.
    """
    from scalevit.config.from_timm.arguments import read_arguments
    from scalevit.config.from_timm.convert import convert
    from scalevit.config.from_timm.page import markdown
    from scalevit.config.from_timm.text import config_text

    if arguments.markdown:
        print(markdown())
        return
    if arguments.command is None:
        raise UserError("scalevit from-timm: the command is missing: give it in quotes, or a .yaml file")
    target = None if arguments.output is None else Path(arguments.output)
    if target is not None:
        _check(target)
    given = read_arguments(arguments.command)
    converted = convert(given, processes=arguments.gpus, exact=arguments.exact, timm=TimmRegistries())
    text = config_text(converted.settings, {"timm": given.source})
    print(*converted.lines, sep="\n", file=sys.stderr)
    if target is None:
        print(text, end="")
    else:
        write_whole(target, text.encode())
        print(f"wrote {target}; start it by: scalevit train --config {target}")


def _check(target: Path) -> None:
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; choose another name")
    check_writable(target)


class TimmRegistries:
    """What timm's registries know. Imported late: a mistake in the command is reported before, which takes seconds."""

    def model(self, name: str) -> "ModelFacts":
        import timm
        import torch
        from timm.layers import DropPath

        from scalevit.config.from_timm.conversion import ModelFacts
        from scalevit.models.build import pretrained_config

        try:
            known = pretrained_config(name)
        except SettingError as error:
            raise UserError(f"--model {error.value}: {error.reason}") from None
        with torch.device("meta"):
            modules = list(timm.create_model(name.partition(".")[0]).modules())
        rates = [float(module.drop_prob) for module in modules if isinstance(module, DropPath) and module.drop_prob]
        return ModelFacts(
            image_size=known.input_size[-1] if known.input_size else 224,
            num_classes=known.num_classes,
            interpolation=known.interpolation or "bicubic",
            crop_mode=known.crop_mode or "center",
            drop_path=round(max(rates, default=0.0), 6),  # timm spreads it over the blocks in fp32
        )

    def optimizer_arguments(self, name: str) -> frozenset[str]:
        from timm.optim import get_optimizer_info, list_optimizers

        names = [str(known) for known in list_optimizers()]
        if name not in names:
            raise UserError(f"--opt {name}: is not an optimizer of timm{nearest_hint(name, names)}")
        info = get_optimizer_info(name)
        has = {"eps": info.has_eps, "betas": info.has_betas, "momentum": info.has_momentum}
        return frozenset(argument for argument, present in has.items() if present)

    def engine(self, config: "Config", processes: int) -> "EngineSettings":
        from scalevit.training.setting_checks import engine_that_fits

        return engine_that_fits(config, ranks=processes)

    def check(self, config: "Config", processes: int) -> None:
        from scalevit.training.setting_checks import check_settings

        check_settings(config, ranks=processes)
