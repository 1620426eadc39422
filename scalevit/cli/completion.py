"""`scalevit completion`: prints the script with which a shell completes commands, options, presets and settings."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalevit.cli import main
from scalevit.config.keys import all_keys, is_free_form
from scalevit.config.loading import preset_names
from scalevit.models.reductions import REDUCTIONS
from scalevit.planning.devices import device_names

EXAMPLES = """\
  scalevit completion bash > ~/.local/share/bash-completion/completions/scalevit
  scalevit completion zsh > ~/.zsh/completions/_scalevit    # a folder in $fpath
  scalevit completion fish > ~/.config/fish/completions/scalevit.fish"""

# Of an argument that may be a file, for shtab. In bash the last lines do it.
_FILES = {"zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}
# Because bash splits key=value into three words, and adds a space to what it completes.
_BASH_END = """
_scalevit() {
  if [[ ${COMP_WORDS[COMP_CWORD]} == "=" || ${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then
    COMPREPLY=()  # the value of a setting: files
    return
  fi
  _shtab_scalevit
  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}
complete -o bashdefault -o default -F _scalevit scalevit"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that the script is for")


def run(arguments: argparse.Namespace) -> None:
    """Prints the script."""
    import shtab

    parser = main.top_parser()
    main.COMMANDS.add_whole(parser)
    _add_completions(parser, _named_words())
    print(shtab.complete(parser, arguments.shell))
    if arguments.shell == "bash":
        print(_BASH_END)


def _named_words() -> dict[str, Any]:
    """What completes an argument, by its name in the namespace."""
    keys = list(dict.fromkeys(key.name for key in all_keys()))
    settings = [key.name for key in all_keys() if not key.is_section or is_free_form(key.name)]
    presets = _words("presets", preset_names())
    values = _words("settings", [f"{name}=" for name in dict.fromkeys(settings)])
    return {
        "config": presets,
        "first": presets,
        "second": presets,
        "keys": _words("keys", keys),
        "overrides": values,
        "vary": values,
        "device": _words("devices", device_names()),
        "strategies": _words("reductions", [part.kind() for part in REDUCTIONS]),
    }


def _words(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Completes words, and files where none of them fits, as `complete` of an argument for shtab.

    Args:
        name: of the words, for the shells' functions.
    """
    function, joined = f"_scalevit_{name}", shlex.join(words)
    no_space = "-S '' " if words[0].endswith("=") else ""
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{joined}" -- "$1"\n}}\n',
            "zsh": f"{function}() {{\n  compadd {no_space}-- {joined} || _files\n}}\n",
            "fish": f"function {function}\n"
            f"  set -l words {joined}\n"
            "  set -l word (commandline -ct)\n"
            '  if string match -q -- "$word*" $words\n'
            "    printf '%s\\n' $words\n"
            "  else\n"
            "    __fish_complete_path $word\n"
            "  end\n"
            "end\n",
        },
    }


def _add_completions(parser: argparse.ArgumentParser, named: dict[str, Any]) -> None:
    """Tells shtab how to complete the arguments of a parser and of its commands that have no choices."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _add_completions(command, named)
        elif action.choices is None and action.nargs != 0 and action.type in (None, Path):
            action.complete = named.get(action.dest, _FILES)  # type: ignore[attr-defined]
