"""What every script in `launch/` does first: a config from the command line, and a user's mistake in one line."""

import argparse
import os
from collections.abc import Callable

from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.errors import one_line_errors


def launch(action: Callable[[Config], None], description: str | None) -> None:
    """Reads `--config FILE [key.sub=value ...]`, as the launchers start it on every rank, and runs the action."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a JSON file, see configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file's")
    arguments = parser.parse_intermixed_args()
    with one_line_errors(rank=int(os.environ.get("RANK", "0"))):
        action(load_config(arguments.config, arguments.overrides))
