"""What a user did wrong, as opposed to a bug: one line, exit status 2, no traceback."""


class UserError(Exception):
    """A mistake in a config, a path or a data set. The message says what, where and how to mend it.

    Entry points (`scalevit.cli`, `launch/*.py`) print the message as one line and exit with status 2.
    Every other exception is a bug and keeps its traceback.
    """
