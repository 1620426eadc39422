"""`scalevit evaluate`: evaluates weights on the validation shards of a config, every image once."""

import argparse
import json
import sys

from scalevit.cli.local_ranks import add_ranks, start_ranks
from scalevit.cli.parsing import add_config
from scalevit.cli.weights_target import config_of_target
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.errors import UserError

_PRINTED_FAULTS = 5
EXAMPLES = """\
  scalevit evaluate runs/quickstart    # the best weights of a run, with its config
  scalevit evaluate runs/quickstart/final.safetensors evaluation.batch=64
  scalevit evaluate --config grouped model.initial_weights=best_ema.safetensors --ranks all

under a launcher:
  torchrun --nproc-per-node 8 -m scalevit evaluate runs/vit_base_grouped"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=False)
    add_ranks(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, and prints one line of JSON on rank 0; bad samples are named on standard error too. Returns the
    exit status.

    Raises:
        UserError: a mistake in the config, the data or the weights.
    """
    given = arguments.overrides
    target, overrides = (given[0], given[1:]) if given and "=" not in given[0] else (None, given)
    config = _config(arguments.config, target, overrides)
    if arguments.ranks is not None:
        options = [] if arguments.config is None else ["--config", arguments.config]
        return start_ranks(arguments.ranks, "evaluate", [*options, *given])
    # Imported late: a mistake in the config is reported before torch and timm are loaded, which takes seconds.
    from scalevit.training.run import prepare_evaluation

    prepared = prepare_evaluation(config)
    result = prepared.evaluate()
    if prepared.world.is_first:
        for fault in result.faults[:_PRINTED_FAULTS]:
            print(f"warning: bad sample: {fault}", file=sys.stderr)
        if more := len(result.faults[_PRINTED_FAULTS:]):
            print(f"warning: ... and {more} more; `scalevit shards verify` lists all", file=sys.stderr)
        weights = config.model.weights_source
        print(json.dumps({"weights": weights, **result.metrics, "data_faults": len(result.faults)}))
    return 0


def _config(config: str | None, target: str | None, overrides: list[str]) -> Config:
    """The config with the weights to evaluate in `model.initial_weights`.

    Args:
        config: as given by `--config`.
        target: a run folder, or a weights file.

    Raises:
        UserError: nothing says what to evaluate, or with which config.
    """
    if target is not None:
        return config_of_target(target, config, overrides)
    if config is None:
        raise UserError("name a run folder or a weights file, or give --config and model.initial_weights=FILE")
    found = load_config(config, overrides)
    if found.model.weights_source is None:
        raise UserError("config: model.initial_weights = null: name the weights to evaluate")
    return found
