"""`scalevit evaluate`: evaluates weights on the validation shards of a config, every image once."""

import argparse
import json

from scalevit.cli.parsing import add_config
from scalevit.config.loading import load_config
from scalevit.errors import UserError

_EXAMPLES = """\
examples:
  scalevit evaluate --config quickstart model.initial_weights=runs/quickstart/best_ema.safetensors
  torchrun --nproc-per-node 8 -m scalevit evaluate --config grouped model.initial_weights=best_ema.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, and prints one line of JSON on rank 0.

    Raises:
        UserError: a mistake in the config, the data or the weights.
    """
    config = load_config(arguments.config, arguments.overrides)
    if config.model.initial_weights is None:
        raise UserError("config: model.initial_weights = null: name the weights to evaluate")
    # Imported late: a mistake in the config is reported before torch and timm are loaded, which takes seconds.
    from scalevit.training.run import prepare_evaluation

    prepared = prepare_evaluation(config)
    metrics = prepared.evaluate()
    if prepared.world.is_first:
        print(json.dumps({"weights": config.model.initial_weights, **metrics}))
