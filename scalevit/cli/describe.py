"""`scalevit describe`: parameters and multiply-accumulates of a config's model."""

import argparse

from scalevit.cli.parsing import add_config
from scalevit.config.loading import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints one column for the unreduced model and one for the reduced model.

    Raises:
        UserError: as `load_config` and `build_model`.
    """
    config = load_config(arguments.config, arguments.overrides)
    from scalevit.models.description import print_description

    print_description(config.model, config.reduction)
