"""What a user did wrong, as opposed to a bug: one line, exit status 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a config, a path or a data set. The message says what, where and how to mend it.

    Entry points (`scalevit.cli`, `launch/*.py`) print the message as one line and exit with status 2.
    Every other exception is a bug and keeps its traceback.
    """


@contextmanager
def one_line_errors(*, speaks: bool = True) -> Iterator[None]:
    """Turns a `UserError` into its line on standard error and exit status 2.

    Args:
        speaks: whether this process prints (rank 0); the others end in silence.
    """
    try:
        yield
    except UserError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
