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
    from scalevit.distributed import World
    from scalevit.engines.factory import check_engine
    from scalevit.training.evaluation import evaluate
    from scalevit.training.run import open_evaluation, prepare_engine, resolve_normalisation

    world = World.from_environment()
    config = resolve_normalisation(config)
    check_engine(config.engine, world)
    loader = open_evaluation(config, world)
    shard = prepare_engine(config, world)
    with world.process_group(loaders=config.data.workers, offloads=config.engine.offloads):
        accuracy = evaluate(shard(), loader, channels_last=config.train.channels_last)
    if world.is_first:
        print(json.dumps({"weights": config.model.initial_weights, **vars(accuracy)}))
