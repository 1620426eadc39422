"""Starting runs as a user does: the launchers, small configs, and what a run leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "train.py")
EVALUATE = str(ROOT / "launch" / "evaluate.py")
QUICKSTART = str(ROOT / "configs" / "quickstart.json")
# Entry points that were installed beside this interpreter.
BIN = Path(sys.executable).parent
# A process or a step that takes longer is taken for hung. Generous: tests must not fail because other work runs beside
# them. SCALEVIT_TEST_PATIENCE=3 multiplies it, for a machine that is slower still.
SECONDS = 600 * float(os.environ.get("SCALEVIT_TEST_PATIENCE", "1"))


@dataclass(frozen=True)
class Outcome:
    status: int
    output: str
    errors: str


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what a launcher around it may have set, and with one thread: tests share two cores."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


def with_support(path: str | None) -> str:
    """A PYTHONPATH with this folder in front."""
    return os.pathsep.join([str(Path(__file__).parent), *([path] if path else [])])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher: str, processes: int = 1) -> list[str]:
    """python, torchrun or deepspeed, up to and with the script."""
    port = str(free_port())
    match launcher:
        case "python":
            return [sys.executable, SCRIPT]
        case "torchrun":
            return [str(BIN / "torchrun"), "--nproc-per-node", str(processes), "--master-port", port, SCRIPT]
        case "deepspeed":
            return [str(BIN / "deepspeed"), "--num_accelerators", str(processes), "--master_port", port, SCRIPT]
    raise ValueError(launcher)


class _ForkServer:
    """A process that has imported everything and forks what is asked for. See `fork_server.py`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # It ends when its input does: with this process.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            env=environment(PYTHONPATH=with_support(os.environ.get("PYTHONPATH"))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


@cache
def _fork_server() -> _ForkServer:
    """One for all tests of this process."""
    return _ForkServer()


class Ranks:
    """A script, once for each rank, as a launcher would start it; but forked, so that nothing is imported again."""

    def __init__(
        self,
        ranks: int,
        script: str,
        *arguments: str | Path,
        log: Path,
        errors: Path | None = None,
        folder: Path | None = None,
    ):
        """Starts them.

        Args:
            log: what they print is added to it.
            errors: the same for standard error, by default `log`.
            folder: where they are started, by default where this process is.
        """
        self._log, self._server = log, _fork_server()
        request = {
            "ranks": ranks,
            "port": str(free_port()),
            "script": script,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder or Path.cwd()),
            "environment": environment(PYTHONPATH=with_support(os.environ.get("PYTHONPATH"))),
            "log": str(log.absolute()),
            "errors": str((errors or log).absolute()),
        }
        self.processes: list[int] = self._server.ask(request)
        """Their ids."""

    def end(self, seconds: float = SECONDS) -> list[int]:
        """Waits for all of them; returns their statuses, of one that a signal ended a negative one.

        Raises:
            AssertionError: one runs longer, with what it said; none is left running.
        """
        deadline = time.monotonic() + seconds
        while None in (statuses := self._server.ask({"ended": self.processes})):
            if any(statuses):  # one failed, and the others may wait for it forever
                deadline = min(deadline, time.monotonic() + SECONDS / 10)
            if time.monotonic() > deadline:
                for process, status in zip(self.processes, statuses, strict=True):
                    if status is None:
                        os.kill(process, signal.SIGKILL)
                raise AssertionError(f"still running: statuses {statuses}\n{self._log.read_text()[-6000:]}")
            time.sleep(0.05)
        return statuses

    def wait(self, seconds: float = SECONDS) -> None:
        """Until all have ended.

        Raises:
            AssertionError: one failed or ran longer, with what they said; none is left running.
        """
        statuses = self.end(seconds)
        # A process that a signal ended may have said nothing.
        assert not any(statuses), f"{self._log.name}: statuses {statuses}\n{self._log.read_text()[-6000:]}"


class Workplace:
    """A folder in which scripts are run, `launch/train.py` by default; all ranks write to one log there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, name: str, arguments: list[str], *, ranks: int = 1, script: str = SCRIPT) -> Ranks:
        return Ranks(ranks, script, *arguments, log=self.folder / f"{name}.log", folder=self.folder)

    def evaluate(self, *arguments: str) -> Outcome:
        """`launch/evaluate.py` on one rank, output and errors apart."""
        with tempfile.TemporaryDirectory() as logs:
            log, errors = (Path(logs) / name for name in ("output", "errors"))
            (status,) = Ranks(1, EVALUATE, *arguments, log=log, errors=errors, folder=self.folder).end()
            return Outcome(status, log.read_text(), errors.read_text())

    def run(self, name: str, arguments: list[str], *, ranks: int = 1, script: str = SCRIPT) -> Outcome:
        """Starts and waits. The log is both output and errors; the status is that of a rank that failed, if one did."""
        status = max(self.start(name, arguments, ranks=ranks, script=script).end(), key=abs)
        return Outcome(status, self.log(name), self.log(name))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def start(arguments: list[str], *, cwd: Path) -> "subprocess.Popen[str]":
    """In a process group of its own, so that a signal can reach it as Ctrl-C does."""
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> Outcome:
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"still running after {SECONDS:.0f} s:\n{output}\n{errors}") from None
    return Outcome(process.returncode, output, errors)


def run(arguments: list[str], *, cwd: Path) -> Outcome:
    return finish(start(arguments, cwd=cwd))


def metrics(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]
