"""All tests and benchmarks that need a GPU, in one command and in bounded time: correctness first, then times.

    python tests/support/gpu_session.py --output FOLDER [--pack] [--seconds 530] [--parts tests tuning ...]

Each part is a process with its own time budget and log. A part that fails or runs out of time does not stop the
others, and the files that it has written are kept. FOLDER then contains session.json (which parts ran, how they ended,
device and versions) beside the parts' own CSV, JSON and PNG files; with --pack, all of these are in results.tar.gz,
rewritten after each part, for machines from which few files can be copied. Needs torch, Triton and pytest; parts that
need more are skipped with the reason. The exit status is 1 if a part failed. Without a GPU the command says so and
exits with 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout that is not installed works

from scalevit.kernels.timing import environment  # noqa: E402

KERNEL_TESTS = ROOT / "tests" / "kernels"


@dataclass(frozen=True)
class Part:
    """One step. seconds: the time reserved for it; needs: modules without which it is skipped."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def parts(output: Path) -> list[Part]:
    """The steps in order; their seconds add up to under nine minutes."""
    # Triton compiles hundreds of kernels in the tests; side by side where pytest-xdist is installed.
    workers = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    # The 500 steps are the part "parity".
    tests = ("-m", "pytest", "-m", "gpu", "-k", "not 500_steps", "-q", "--durations=10", *workers)
    bench = ("-m", "scalevit.kernels.bench", "--batches", "256", "--shapes", "vit_b", "vit_b_half", "--providers")
    quick = ("eager", "compile", "cublaslt_tanh", "fused_fast", "fused_lean", "fused_recompute")
    # Compiles for minutes. Both sides of a ratio must be measured in one run, so eager and fused are timed again.
    slow = ("eager", "fused_fast", "max-autotune-no-cudagraphs", "--passes", "full")
    tuner = ("-m", "scalevit.kernels.tuning", "--tokens", "50432", "--shape", "768x3072", "768x1536")
    trainer = ("pydantic", "timm", "deepspeed", "webdataset", "rich")
    installed = all(importlib.util.find_spec(module) for module in trainer)
    command = "from scalevit.cli.main import main; main()"
    config = str(ROOT / "configs" / "grouped.json")
    train = ("-c", command, "bench", "train", "--config", config, "--output", str(output))
    return [
        Part("tests", 130, (*tests, str(ROOT / "tests" if installed else KERNEL_TESTS)), needs=("pytest",)),
        Part("parity", 50, (str(KERNEL_TESTS / "kernel_training.py"), "--output", str(output))),
        Part("tuning", 80, (*tuner, "--output", str(output / "tuning"))),
        Part("bench", 120, (*bench, *quick, "--output", str(output))),
        Part("train", 50, train, needs=trainer),
        # Last, because it also uses the time that the others leave.
        Part("autotune", 100, (*bench, *slow, "--output", str(output / "autotune"))),
    ]


@dataclass(frozen=True)
class Outcome:
    """How a part ended. status: "passed", "failed", "out of time" or "skipped"; last: the end of its log."""

    name: str
    status: str
    seconds: float
    command: str
    last: list[str]


def run_part(part: Part, output: Path, seconds: float, variables: dict[str, str]) -> Outcome:
    """Runs one part for at most `seconds`, with its output in `<name>.log`. A failure is part of the outcome."""
    command = "python " + " ".join(part.command)
    missing = [module for module in part.needs if not importlib.util.find_spec(module)]
    if missing:
        return Outcome(part.name, "skipped", 0.0, command, [f"{', '.join(missing)} is not installed"])
    if seconds < 1:
        return Outcome(part.name, "skipped", 0.0, command, ["no time was left"])
    started = time.monotonic()
    log = output / f"{part.name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command], cwd=output, env=variables, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers too
            process.wait()
    last = log.read_text(errors="replace").splitlines()[-40:]
    return Outcome(part.name, status, round(time.monotonic() - started, 1), command, last)


def part_environment(output: Path) -> dict[str, str]:
    """The parts' environment: they import this checkout, installed or not, and use the tables that "tuning" wrote."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "SCALEVIT_TUNING": str(output / "tuning")}


def pack(folder: Path, archive: Path) -> None:
    """Writes everything under a folder to a .tar.gz, replaced as a whole."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name)
    partial.replace(archive)


def run_session(
    chosen: list[Part], output: Path, seconds: float, about: dict[str, object], packed: Path | None = None
) -> list[Outcome]:
    """Runs the parts within `seconds` in total, and rewrites session.json after each.

    packed: a folder for session.json and results.tar.gz; without it all files are in `output`.
    """
    record_folder = packed or output
    for folder in (output, record_folder):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    variables = part_environment(output)
    for i, part in enumerate(chosen):
        # All the time that is not reserved for later parts; what an earlier part saves is available to later ones.
        reserved = sum(later.seconds for later in chosen[i + 1 :])
        outcome = run_part(part, output, deadline - time.monotonic() - reserved, variables)
        outcomes.append(outcome)
        record = about | {"parts": [asdict(o) for o in outcomes]}
        (record_folder / "session.json").write_text(json.dumps(record, indent=1) + "\n")
        if packed is not None:
            pack(output, packed / "results.tar.gz")
        print(f"--- {part.name}: {outcome.status} after {outcome.seconds:.0f} s", *outcome.last[-12:], sep="\n")
    return outcomes


def describe() -> dict[str, object]:
    """The environment record of the session, with the commit."""
    commit = None  # the tree may be a copy without a repository, and the machine may lack git
    if shutil.which("git"):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return environment(torch.device("cuda", 0), " ".join(["python", *sys.argv])) | {"commit": commit}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All tests and benchmarks that need a GPU, in bounded time.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=530, help="for all parts together (default: %(default)s)")
    parser.add_argument("--pack", action="store_true", help="leave two files: session.json and results.tar.gz")
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in parts(Path())], help="run only these")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU on this machine: the tests and benchmarks that need one were not run")
        return 0
    output = arguments.output.resolve()
    with tempfile.TemporaryDirectory() if arguments.pack else nullcontext(output) as folder:
        work = Path(folder)
        chosen = [p for p in parts(work) if arguments.parts is None or p.name in arguments.parts]
        packed = output if arguments.pack else None
        outcomes = run_session(chosen, work, arguments.seconds, describe(), packed)
    print("\n".join(f"{o.name:8} {o.status:12} {o.seconds:6.1f} s" for o in outcomes))
    return 1 if any(o.status in ("failed", "out of time") for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
