"""`scalevit export`: writes a trained model for other tools, verified."""

import argparse
import sys
from pathlib import Path

from scalevit.cli.parsing import add_weight_set
from scalevit.errors import SettingError, UserError
from scalevit.export import EXPORTERS
from scalevit.export.source import find_source

EXAMPLES = """\
  scalevit export runs/photos photos.safetensors --to timm
  scalevit export runs/photos photos_model --to huggingface
  scalevit export runs/photos/checkpoints/step-00001000 photos.pt2 --to torch --weights weights
  scalevit export runs/photos/final.safetensors photos.onnx --to onnx
  scalevit export runs/nested half.safetensors --to timm --width 0.5    # trained at several widths"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    forms = "\n".join(f"  {exporter.name:13}{exporter.purpose}" for exporter in EXPORTERS)
    parser.description = (
        f"{parser.description}\n\nforms:\n{forms}\n\nWhat is written is first read back as another tool reads it, and "
        "compared with the model."
    )
    parser.add_argument(
        "source",
        metavar="RUN|CHECKPOINT|FILE",
        help="a run folder, whose best weights are taken, a checkpoint, or a weights file",
    )
    parser.add_argument("target", metavar="TARGET", help="a new file, or a new folder, as the form asks")
    parser.add_argument("--to", required=True, choices=[exporter.name for exporter in EXPORTERS], help="the form")
    add_weight_set(parser)
    parser.add_argument(
        "--tied", action="store_true", help="write shared tensors once (--to timm): smaller, but timm must tie them"
    )
    parser.add_argument(
        "--width", type=float, metavar="FRACTION", help="keep only the first hidden units of each MLP, e.g. 0.5"
    )
    parser.add_argument("--config", help="of the run; default: the config.json in the run folder or beside the file")


def run(arguments: argparse.Namespace) -> None:
    """Exports, and prints how the export is loaded.

    Raises:
        UserError: a mistake in the arguments, or the form cannot hold this model.
    """
    exporter = next(exporter for exporter in EXPORTERS if exporter.name == arguments.to)
    if arguments.tied and not exporter.can_tie:
        able = " or ".join(exporter.name for exporter in EXPORTERS if exporter.can_tie)
        raise UserError(f"--tied applies to --to {able}, not to --to {exporter.name}")
    target = Path(arguments.target)
    exporter.check()
    exporter.check_target(target)
    source = find_source(arguments.source, config=arguments.config, weights=arguments.weights, config_required=False)
    # Imported late: a mistake in the arguments is reported before torch and timm are loaded, which takes seconds.
    from scalevit.export.publish import publish
    from scalevit.export.trained_model import cut, read_model

    model, description = read_model(source)
    if arguments.width is not None:
        try:
            description = cut(model, description, arguments.width)
        except SettingError as error:
            raise UserError(f"--width {arguments.width:g}: {error.reason}") from None
        if arguments.width not in getattr(source.config.task, "widths", ()):
            print(f"warning: the run was not trained at width {arguments.width:g} (task.widths)", file=sys.stderr)
    difference = publish(exporter, model, description, target, tied=arguments.tied)
    print(f"wrote {target}: {source}; largest difference of a logit, read back: {difference:.3g}")
    if usage := exporter.usage(target):
        print(usage)
