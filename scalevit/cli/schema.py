"""`scalevit schema`: prints the JSON schema of config files, or the page of all settings."""

import argparse
import json

EXAMPLES = """\
  scalevit schema > schema.json             # for an editor that completes and checks config files
  scalevit schema --markdown > config.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print a table of all settings instead")


def run(arguments: argparse.Namespace) -> None:
    """Prints it."""
    from scalevit.config.schema import json_schema, markdown

    print(markdown() if arguments.markdown else json.dumps(json_schema(), indent=2))
