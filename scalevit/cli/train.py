"""`scalevit train`: from a config to a run and its results."""

import argparse

from scalevit.cli.parsing import add_config
from scalevit.config.loading import load_config

_EXAMPLES = """\
examples:
  scalevit train --config quickstart                                      one process
  deepspeed --module scalevit train --config grouped train.epochs=90      all GPUs of this machine
  torchrun --nproc-per-node 8 -m scalevit train --config fsdp             the same with torchrun

The same command resumes an interrupted run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints the results on rank 0.

    Raises:
        UserError: a mistake in the config, the data or the run folder.
    """
    config = load_config(arguments.config, arguments.overrides)
    # Imported late: a mistake in the config is reported before torch and timm are loaded, which takes seconds.
    from scalevit.config.tree import SECTIONS
    from scalevit.distributed import World
    from scalevit.engines.factory import check_engine
    from scalevit.errors import naming_settings
    from scalevit.models.costs import model_costs
    from scalevit.runs.folder import RunFolder
    from scalevit.runs.summary import print_summary
    from scalevit.training.run import open_data, prepare_engine, resolve_normalisation
    from scalevit.training.trainer import Trainer, find_resumable

    world = World.from_environment()
    config = resolve_normalisation(config)
    folder = RunFolder(config, writes=world.is_first)
    # Mistakes first, the cheapest to find before the others: the model's shapes, the run folder, the data.
    check_engine(config.engine, world)
    with naming_settings(SECTIONS):
        costs = model_costs(config.model, config.reduction)
    checkpoints = find_resumable(config, folder)
    data = open_data(config, world)
    shard = prepare_engine(config, world)
    with world.process_group(loaders=config.data.workers, offloads=config.engine.offloads):
        summary = Trainer(config, world, shard(), data, folder, costs).fit(resume_from=checkpoints)
    if world.is_first:
        print_summary(summary, folder.path)
