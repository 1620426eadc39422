"""Ctrl-C and SIGTERM as a wish to stop between two steps, when a checkpoint can be saved."""

import os
import signal
from types import FrameType, TracebackType


class Stopped(SystemExit):
    """The run ended on a signal, with everything saved; the exit status is the shell's for that signal."""


class StopSignal:
    """Collects the wish while a block runs; a second Ctrl-C stops at once.

    Launchers turn one Ctrl-C into an interrupt and a termination, so only a second *interrupt* counts as impatience.
    """

    def __init__(self, *, speaks: bool) -> None:
        """speaks: whether this process says that it heard."""
        self._speaks = speaks
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._received is not None

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if self._received is not None:
            return
        self._received = number
        if self._speaks:
            os.write(2, b"stopping after this step\n")  # print may be what the signal interrupted

    def leave(self) -> None:
        """Ends the process the way the signal asked for.

        Raises:
            Stopped: always.
        """
        raise Stopped(128 + (self._received or signal.SIGTERM))
