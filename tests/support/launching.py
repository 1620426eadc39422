"""Starting runs as a user does: the launchers, small configs, and what a run leaves behind."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
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


class Ranks:
    """A script of a test's own, once for each rank, as a launcher would start it."""

    def __init__(self, ranks: int, script: str, *arguments: str | Path, logs: Path):
        """logs: folder for what each rank prints."""
        port = str(free_port())
        self._logs = [logs / f"rank{rank}of{ranks}.log" for rank in range(ranks)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            path = with_support(os.environ.get("PYTHONPATH"))
            places = {k: str(v) for k, v in place.items()}
            env = environment(PYTHONPATH=path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **places)
            with log.open("w") as file:
                self._processes.append(
                    subprocess.Popen([sys.executable, script, *arguments], env=env, stdout=file, stderr=file)
                )

    def wait(self, seconds: float) -> None:
        """Until all have ended.

        Raises:
            AssertionError: one failed or ran longer, with what it said; none is left running.
        """
        deadline = time.monotonic() + seconds
        try:
            while any(process.poll() is None for process in self._processes):
                self._check(deadline)
                time.sleep(0.1)
            self._check(math.inf)
        finally:
            for process in self._processes:
                process.kill()

    def _check(self, deadline: float) -> None:
        for log, process in zip(self._logs, self._processes, strict=True):
            # A process that a signal ended (a negative status) may have said nothing.
            assert not process.returncode, f"{log.name}: status {process.returncode}\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, f"still running: {self._logs[0].read_text()[-3000:]}"


class ForkServer:
    """Scripts, `launch/train.py` by default, that are forked from a process which has imported everything.

    See `fork_server.py`.
    """

    def __init__(self, workplace: Path):
        """workplace: where the runs are started; holds their logs."""
        self.workplace = workplace
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            cwd=workplace,
            env=environment(PYTHONPATH=with_support(os.environ.get("PYTHONPATH"))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, name: str, arguments: list[str], *, ranks: int, script: str = SCRIPT) -> list[int]:
        """Starts a script on each rank; returns the process ids. `answer` then waits for the end."""
        log = str(self.workplace / f"{name}.log")
        request = {"ranks": ranks, "port": str(free_port()), "script": script, "arguments": arguments, "output": log}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def run(self, name: str, arguments: list[str], *, ranks: int = 1, script: str = SCRIPT) -> Outcome:
        """Starts and waits. All ranks write to one log, which is both output and errors; the status is the largest."""
        self.start(name, arguments, ranks=ranks, script=script)
        status = max(self.answer())
        return Outcome(status, self.log(name), self.log(name))

    def answer(self) -> Any:
        """The next answer: after `start`'s own, the exit status of each rank."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def log(self, name: str) -> str:
        return (self.workplace / f"{name}.log").read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


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
