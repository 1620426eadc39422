"""`scalevit evaluate`: evaluates weights on the validation shards of a config, every image once."""

import argparse
import json
import sys

from scalevit.cli.local_ranks import add_ranks, start_ranks
from scalevit.cli.parsing import add_config
from scalevit.config.loading import load_config
from scalevit.errors import UserError

_PRINTED_FAULTS = 5
_EXAMPLES = """\
examples:
  scalevit evaluate --config quickstart model.initial_weights=runs/quickstart/best_ema.safetensors
  scalevit evaluate --config grouped model.initial_weights=best_ema.safetensors --ranks all
  torchrun --nproc-per-node 8 -m scalevit evaluate --config grouped model.initial_weights=best_ema.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config(parser)
    add_ranks(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, and prints one line of JSON on rank 0; bad samples are named on standard error too. Returns the
    exit status.

    Raises:
        UserError: a mistake in the config, the data or the weights.
    """
    config = load_config(arguments.config, arguments.overrides)
    if arguments.ranks is not None:
        return start_ranks(arguments.ranks, "evaluate", ["--config", arguments.config, *arguments.overrides])
    if config.model.initial_weights is None:
        raise UserError("config: model.initial_weights = null: name the weights to evaluate")
    # Imported late: a mistake in the config is reported before torch and timm are loaded, which takes seconds.
    from scalevit.training.run import prepare_evaluation

    prepared = prepare_evaluation(config)
    result = prepared.evaluate()
    if prepared.world.is_first:
        for fault in result.faults[:_PRINTED_FAULTS]:
            print(f"warning: bad sample: {fault}", file=sys.stderr)
        if more := len(result.faults[_PRINTED_FAULTS:]):
            print(f"warning: ... and {more} more; `scalevit shards verify` lists all", file=sys.stderr)
        weights = config.model.initial_weights
        print(json.dumps({"weights": weights, **result.metrics, "data_faults": len(result.faults)}))
    return 0
