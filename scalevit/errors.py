"""Errors of the user, as opposed to bugs: one line, exit status 2, no traceback."""

import difflib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in a config, a path or a data set. The message says what is wrong, where, and how to fix it.

    Entry points (`scalevit.cli.main`, `launch/*.py`) print the message as one line and exit with status 2.
    Every other exception is a bug and keeps its traceback.
    """


class SettingError(UserError):
    """A value that a room cannot use. It names the room's own argument; `naming_settings` adds the config key."""

    def __init__(self, argument: str, value: Any, reason: str):
        """
        Args:
            argument: the room's own name for the value.
            value: as given; printed as JSON.
            reason: what is wrong and what is allowed, e.g. "must be even for mixup".
        """
        self.argument, self.value, self.reason = argument, value, reason
        super().__init__(f"{argument} = {json.dumps(value, default=str)}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Loader workers send errors to the training process, and `args` holds the message only."""
        return type(self), (self.argument, self.value, self.reason)


@contextmanager
def naming_settings(keys: Mapping[str, str]) -> Iterator[None]:
    """Turns a `SettingError` of the block into a `UserError` that names the config key.

    Args:
        keys: config key by argument, e.g. {"micro_batch": "train.micro_batch"}. A section's key covers its fields
            too: {"model": "model"} names `model.image_size`.
    """
    try:
        yield
    except SettingError as error:
        section, dot, field = error.argument.partition(".")
        key = keys.get(error.argument) or (f"{keys[section]}{dot}{field}" if section in keys else None)
        if key is None:
            raise
        value = json.dumps(error.value, default=str)
        raise UserError(f"config: {key} = {value}: {error.reason}") from error


@contextmanager
def settings_of(argument: str) -> Iterator[None]:
    """Names what the block's `SettingError`s name as fields of a section: `scale` becomes `reduction.scale`.

    Args:
        argument: the room's own name of the section, e.g. "reduction".
    """
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{argument}.{error.argument}", error.value, error.reason) from error


def require(module: str, *, extra: str) -> None:
    """Makes sure that an optional package is installed, before it is imported where it is used.

    Args:
        module: its import name, e.g. "wandb".
        extra: the extra of scalevit that installs it, e.g. "wandb".

    Raises:
        UserError: it is missing; names the command that installs it.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:  # a folder of that name, as wandb leaves one, is not the package
        raise UserError(f"the package {module!r} is not installed; {install_hint(extra)}")


def install_hint(extra: str) -> str:
    """How to install an extra of scalevit, for the end of a message: from a package index, or in a checkout."""
    return f"install the extra: pip install 'scalevit[{extra}]', or in a checkout pip install -e '.[{extra}]'"


def nearest_hint(given: str, valid: Iterable[str], *, cutoff: float = 0.5, prefix: str = "") -> str:
    """The end of a message about an unknown name: "; nearest: NAME", or nothing if no valid name is like it.

    Args:
        cutoff: least similarity, 0 to 1 (`difflib.get_close_matches`).
        prefix: put before the name, e.g. the key of the section that it is a field of: "train.".
    """
    by_lower_case = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(given.lower(), by_lower_case, n=1, cutoff=cutoff)
    return f"; nearest: {prefix}{by_lower_case[close[0]]}" if close else ""


# How long other ranks wait for rank 0 to report the same error. A launcher ends all ranks when one has ended.
_SECONDS_FOR_RANK_ZERO = 15.0


@contextmanager
def one_line_errors(*, rank: int = 0) -> Iterator[None]:
    """Turns a `UserError` into its line on standard error and exit status 2.

    Most errors occur on every rank; rank 0 reports them. The other ranks wait for that, and report an error that only
    they have (for example a path that is missing on one node).
    """
    try:
        yield
    except UserError as error:
        if rank:
            time.sleep(_SECONDS_FOR_RANK_ZERO)
        line = f"rank {rank}: {error}" if rank else str(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        _write_for_torchrun(line)
        sys.exit(2)


def _write_for_torchrun(line: str) -> None:
    """Writes the file from which torchrun's own report, the last thing on the screen, takes the cause of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(content))
