"""`scalevit config`: explains, compares and checks settings. Arguments and printing; only `check` imports torch."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from scalevit.cli.parsing import add_action, add_overrides
from scalevit.config.keys import Key, all_keys, find_key, flat_settings, is_free_form
from scalevit.config.loading import is_overlay, is_override, load_config
from scalevit.config.tree import Config
from scalevit.errors import UserError

_WIDTH = 100
_OF_PEAK = ("optimizer.lr", "optimizer.lr_base_batch")
_SHOW = """\
  scalevit config show                               # every key
  scalevit config show train.micro_batch             # one key: type, default, meaning
  scalevit config show optimizer --config grouped    # a section, with the values of a config"""
_DIFF = """\
  scalevit config diff baseline grouped              # what differs between two configs
  scalevit config diff runs/one runs/two             # ... or two runs
  scalevit config diff grouped @recipes/digits       # what a further config changes"""
_CHECK = """\
  scalevit config check my.json train.epochs=90      # whether a config is valid"""
EXAMPLES = f"{_SHOW}\n{_DIFF}\n{_CHECK}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions of `scalevit config` to its parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = add_action(
        actions, "show", "explain a key, a section, or all: type, default, meaning, allowed values", _SHOW
    )
    show.add_argument(
        "keys",
        nargs="*",
        metavar="key",
        help="e.g. train.micro_batch or data.augmentation; key.sub=value and @CONFIG change the shown config",
    )
    show.add_argument("--config", help="show the values of this config (a file, a preset, a run folder) as well")
    show.set_defaults(run_action=_show)
    diff = add_action(actions, "diff", "list the settings that differ between two configs", _DIFF)
    diff.add_argument("first", help="a file, a preset or a run folder")
    diff.add_argument("second", help="likewise, or @CONFIG: the first with that laid over it")
    diff.add_argument("--config", action=_WithoutOption, help=argparse.SUPPRESS)
    diff.set_defaults(run_action=_diff)
    check = add_action(actions, "check", "check whether a config is valid", _CHECK)
    check.add_argument("config", help="a file, a preset or a run folder")
    check.add_argument("--config", action=_WithoutOption, help=argparse.SUPPRESS)
    add_overrides(check)
    check.set_defaults(run_action=_check)


class _WithoutOption(argparse.Action):
    """`--config NAME` of other commands, where the name is given without it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option: str | None = None) -> None:
        raise UserError(f"{parser.prog}: configs are given without {option}: {parser.prog} {value} ...")


def run(arguments: argparse.Namespace) -> None:
    """Runs the action.

    Raises:
        UserError: an unknown key, or a config that is not valid.
    """
    arguments.run_action(arguments)


def _show(arguments: argparse.Namespace) -> None:
    overrides = [text for text in arguments.keys if is_override(text)]
    config = _shown_config(arguments.config, overrides)
    values = {} if config is None else dict(flat_settings(config.model_dump(mode="json")))
    for name in [name for name in arguments.keys if name not in overrides] or [""]:
        keys = [key for key in all_keys() if _is_asked(key, name) and _is_selected(key, values)]
        if not keys:
            found = find_key(name)
            hint = f"; nearest: {found}" if found else ""
            raise UserError(f"unknown key {name}{hint}; `scalevit config show` lists all")
        for key in keys:
            if not key.is_section or is_free_form(key.name) or len(keys) == 1:
                print(_described(key, values))
                if key.name in _OF_PEAK and config is not None and config.optimizer.lr_base_batch is not None:
                    print(f"    at train.global_batch = {config.train.global_batch}: {config.peak_lr:g} at the peak")


def _shown_config(name: str | None, overrides: Sequence[str]) -> Config | None:
    if name is not None or not overrides:
        return None if name is None else load_config(name, overrides)
    raise UserError(f"scalevit config show {overrides[0]}: changes a config: name one by --config")


def _is_asked(key: Key, name: str) -> bool:
    return not name or key.name == name or key.name.startswith(f"{name}.")


def _is_selected(key: Key, values: Mapping[str, Any]) -> bool:
    """Whether a config has this type of the key's section; True without a config."""
    selector, _, selected = key.only_with.partition(" = ")
    return selector not in values or values[selector] == selected


def _described(key: Key, values: Mapping[str, Any]) -> str:
    condition = f"  (with {key.only_with})" if key.only_with else ""
    value = f"  here: {json.dumps(values[key.name])}" if key.name in values else ""
    first = f"{key.name}: {key.allowed}  default: {json.dumps(key.default)}{value}{condition}"
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    lines = textwrap.wrap(first, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    meaning = textwrap.wrap(key.meaning, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, *meaning])


def _diff(arguments: argparse.Namespace) -> None:
    overlays = (arguments.second,) if is_overlay(arguments.second) else ()
    loaded = _load(arguments.first), _load(arguments.first if overlays else arguments.second, overlays)
    first, second = (dict(flat_settings(each)) for each in loaded)
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    for name in differing:
        before, after = (json.dumps(each[name]) if name in each else "not set" for each in (first, second))
        print(f"{name}: {before} -> {after}")
    if not differing:
        print("no differences")


def _check(arguments: argparse.Namespace) -> None:
    from scalevit.training.setting_checks import check_settings  # torch and timm take seconds

    check_settings(load_config(arguments.config, arguments.overrides))
    print(f"{arguments.config}: valid (data, weights, devices and the number of ranks are checked when a run starts)")


def _load(name: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """A config as plain values."""
    return load_config(name, overrides).model_dump(mode="json")
