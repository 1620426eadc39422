"""`scalevit train`: from a config to a run and its results."""

import argparse

from scalevit.cli.local_ranks import add_ranks, start_ranks
from scalevit.cli.parsing import add_config
from scalevit.config.loading import load_config

EXAMPLES = """\
  scalevit train --config quickstart                             # one process
  scalevit train --config grouped --ranks all train.epochs=90    # all GPUs of this machine

under a launcher:
  deepspeed --module scalevit train --config grouped train.epochs=90
  torchrun --nproc-per-node 8 -m scalevit train --config fsdp

The same command resumes an interrupted run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_ranks(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains, and prints the results on rank 0. Returns the exit status.

    Raises:
        UserError: a mistake in the config, the data or the run folder.
    """
    config = load_config(arguments.config, arguments.overrides)
    if arguments.ranks is not None:
        return start_ranks(arguments.ranks, "train", ["--config", arguments.config, *arguments.overrides])
    # Imported late: a mistake in the config is reported before torch and timm are loaded, which takes seconds.
    from scalevit.cli.summary_table import print_summary
    from scalevit.reports.run_page import refresh_run_page
    from scalevit.training.run import prepare

    prepared = prepare(config)
    summary = prepared.train(after_evaluation=refresh_run_page)
    if prepared.world.is_first:
        print_summary(summary, prepared.folder.path)
        if page := refresh_run_page(prepared.folder.path):
            print(f"page: {page}")
    return 0
