"""`scalevit schema`: prints the JSON schema of config files."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the schema."""
    from scalevit.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
