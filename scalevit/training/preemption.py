"""SIGINT and SIGTERM as a request to stop between two steps, when a checkpoint can be saved."""

import os
import signal
from types import FrameType, TracebackType


class Interrupted(SystemExit):
    """The run ended on a signal, with everything saved; the exit status is the shell's for that signal."""


class PreemptionHandler:
    """Records SIGINT and SIGTERM while a block runs; a second SIGINT interrupts immediately.

    Launchers turn one Ctrl-C into SIGINT and SIGTERM, so SIGTERM after SIGINT is not a second request.
    """

    def __init__(self, *, verbose: bool) -> None:
        """verbose: whether this process prints that it received the request."""
        self._verbose = verbose
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._received is not None

    def __enter__(self) -> "PreemptionHandler":
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
        if self._verbose:
            os.write(2, b"stopping after this step\n")  # the signal may have interrupted a print

    def exit(self) -> None:
        """Ends the process with the exit status of the signal.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(128 + (self._received or signal.SIGTERM))
