"""`scalevit sweep`: runs of one config with other settings and seeds. Arguments, library calls and printing.

Must not import torch: it starts at once and stays small beside its runs.
"""

import argparse
import os
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from scalevit.cli.local_ranks import add_ranks
from scalevit.cli.parsing import add_config, integer
from scalevit.cli.sweep_view import SweepView, print_results, print_runs
from scalevit.cluster.shares import divide, visible_cores, visible_gpus
from scalevit.errors import UserError
from scalevit.files import check_new, locked, write_whole
from scalevit.launchers import find_launch
from scalevit.reports.sweeps.execution import Execution, log_file, seconds_left
from scalevit.reports.sweeps.model_check import check_models
from scalevit.reports.sweeps.plan import SweepPlan, make_plan, parse_seeds
from scalevit.reports.sweeps.record import check_record, write_record
from scalevit.reports.sweeps.results import combine
from scalevit.reports.sweeps.slurm import array_script
from scalevit.terminal import format_duration

EXAMPLES = """\
  scalevit sweep --config quickstart --vary reduction=none,grouped,shallow,thin --seeds 5
  scalevit sweep --config grouped --vary lr=1e-3,3e-3 --vary ema.decay=0.999,0.9998 --parallel 2 --ranks 4
  scalevit sweep --config quickstart --vary recipe=@grouped,@shallow --seeds 1,2,3 --dry-run
  scalevit sweep --config grouped --vary reduction=grouped,thin --seeds 3 --ranks 8 --slurm sweep.sbatch

The same command resumes an interrupted sweep; with more values or seeds it extends one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a setting and its values, JSON or plain strings; given several times, all combinations are run. The last "
        "part of a key is enough where only one key has it (lr), and a section's name for its type (reduction). Where "
        "all values are @CONFIG, KEY is any name",
    )
    parser.add_argument("--seeds", help="a number of seeds, from 1, or a list: 5, or 1,2,3 (default: the config's)")
    parser.add_argument(
        "--parallel",
        type=integer(1),
        metavar="N",
        help="runs beside each other, each with its share of the cores and GPUs (default: 1)",
    )
    add_ranks(parser)
    parser.add_argument("--name", help="of the sweep's folder in output_dir (default: the config's name and -sweep)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, and start none")
    parser.add_argument("--slurm", metavar="FILE", help="write a script for sbatch with a task for each run instead")
    parser.add_argument(
        "--only", type=integer(0), metavar="INDEX", help="only this run of the list, as Slurm's tasks do"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs a sweep, and prints its results. Returns the exit status: 1 if a run failed.

    Raises:
        UserError: a wrong setting in any combination, or another sweep in the folder.
    """
    if find_launch(os.environ).size > 1:
        raise UserError("scalevit sweep starts processes, but a launcher has started this one: use --ranks instead")
    seeds = None if arguments.seeds is None else parse_seeds(arguments.seeds)
    if not arguments.vary and seeds is None:
        raise UserError("scalevit sweep: name what differs: --vary KEY=V1,V2, --seeds, or both")
    plan = make_plan(arguments.config, arguments.overrides, arguments.vary, seeds, name=arguments.name)
    if arguments.dry_run:
        return _list(plan, arguments)
    if arguments.slurm is not None:
        return _write_script(plan, arguments)
    if arguments.only is not None and arguments.only >= len(plan.runs):
        raise UserError(f"--only {arguments.only}: the sweep has runs 0 to {len(plan.runs) - 1}")
    return _run(plan, arguments)


def _list(plan: SweepPlan, arguments: argparse.Namespace) -> int:
    check_record(plan)
    statuses = Execution(plan, plan.runs).statuses
    print_runs(plan.runs, statuses, check_models(plan, ranks=arguments.ranks or 1))
    left = seconds_left(statuses.values(), together=arguments.parallel or 1)
    expected = "" if left is None else f"; about {format_duration(left)} left, from the runs that are finished"
    print(f"{len(plan.runs)} runs in {plan.folder}{expected}")
    return 0


def _write_script(plan: SweepPlan, arguments: argparse.Namespace) -> int:
    file = Path(arguments.slurm)
    check_new(file)
    check_record(plan)
    check_models(plan, ranks=arguments.ranks or 1)
    write_record(plan)
    script = array_script(plan, file, _command(arguments), ranks=arguments.ranks or 1, together=arguments.parallel)
    write_whole(file, script.encode())
    print(f"wrote {file}; set its #SBATCH lines to your cluster, then: sbatch {shlex.quote(str(file))}")
    return 0


def _command(arguments: argparse.Namespace) -> list[str]:
    """That makes the same plan."""
    command = [sys.executable, "-m", "scalevit", "sweep", "--config", arguments.config]
    for variation in arguments.vary:
        command += ["--vary", variation]
    for option in ("seeds", "name"):
        if (value := getattr(arguments, option)) is not None:
            command += [f"--{option}", value]
    return [*command, *_ranks(arguments), *arguments.overrides]


def _ranks(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.ranks is None else ["--ranks", str(arguments.ranks or "all")]


def _run(plan: SweepPlan, arguments: argparse.Namespace) -> int:
    together = arguments.parallel or 1
    shares = divide(together, visible_cores(), visible_gpus(os.environ) if together > 1 else [])
    runs = plan.runs if arguments.only is None else [plan.runs[arguments.only]]
    check_record(plan)
    view = SweepView(runs, together=together)
    execution = Execution(plan, runs, view)
    if execution.waiting and arguments.only is None:
        try:
            check_models(plan, ranks=arguments.ranks or 1)
        except KeyboardInterrupt:
            print("stopped before the first run", file=sys.stderr)
            return 128 + signal.SIGINT
    write_record(plan)
    try:
        # Tasks of a Slurm array are beside each other; a run's own lock keeps them apart.
        with locked(plan.folder / ".lock", wait=False) if arguments.only is None else nullcontext(), view:
            execution.run(shares, _ranks(arguments))
    except BlockingIOError:
        raise UserError(f"sweep folder {plan.folder}: another sweep is using it; wait for its end") from None
    return _report(execution)


def _report(execution: Execution) -> int:
    """Prints how a sweep has ended; returns the exit status."""
    if execution.of_state("finished"):
        print_results(combine(execution.runs))
    for state, reason in (("failed", None), ("interrupted", "is not finished"), ("running", "in another process")):
        for run in execution.of_state(state) if execution.stopped is None or state == "failed" else ():
            log = f" (log: {log_file(run)})" if log_file(run).exists() else ""
            print(f"{state}: {run.name}: {reason or execution.statuses[run.name].problem}{log}")
    finished, count = len(execution.of_state("finished")), len(execution.runs)
    if finished:
        print(f"{finished} of {count} runs are finished; tables and figures: scalevit report {_quoted(execution)}")
    if execution.stopped is not None:
        print(f"stopped with {finished} of {count} runs finished; run the same command to resume", file=sys.stderr)
        return 128 + execution.stopped
    return int(finished < count)


def _quoted(execution: Execution) -> str:
    return shlex.quote(str(execution.plan.folder))
