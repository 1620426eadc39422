"""What a user did wrong, as opposed to a bug: one line, exit status 2, no traceback."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a config, a path or a data set. The message says what, where and how to mend it.

    Entry points (`scalevit.cli.main`, `launch/*.py`) print the message as one line and exit with status 2.
    Every other exception is a bug and keeps its traceback.
    """


# How long a rank waits for the first to tell the same mistake. A launcher ends all ranks when one has ended.
_SECONDS_FOR_THE_FIRST = 15.0


@contextmanager
def one_line_errors(*, rank: int = 0) -> Iterator[None]:
    """Turns a `UserError` into its line on standard error and exit status 2.

    Most mistakes are met by every rank alike, and told by the first. The others give it time to: if they are still
    there afterwards, the mistake was theirs alone (a path that one node lacks), and they tell it.
    """
    try:
        yield
    except UserError as error:
        if rank:
            time.sleep(_SECONDS_FOR_THE_FIRST)
        print(f"error: rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
