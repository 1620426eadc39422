"""`--ranks`: starts the ranks of a command on this machine by torchrun's own agent, with only the ranks' output."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import scalevit
from scalevit.cli.parsing import integer
from scalevit.errors import UserError
from scalevit.launchers import find_launch

# Between two evaluations of a large model; torchrun kills after 30 s, before a checkpoint may be saved.
_SECONDS_TO_STOP = 600


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Adds `--ranks` to a command that runs on several ranks."""
    parser.add_argument(
        "--ranks",
        type=_count,
        metavar="N",
        help='processes to start on this machine, one for each GPU ("all": as many as there are). Leave it out under '
        "deepspeed, torchrun, srun or mpirun",
    )


def start_ranks(count: int, command: str, arguments: Sequence[str]) -> int:
    """Runs `scalevit COMMAND ARGUMENTS` on several ranks, and waits for them.

    Args:
        count: of ranks; 0 for one on each GPU.

    Returns:
        The exit status: of the first rank that failed, of a shell for the signal that ended the ranks, or 0.

    Raises:
        UserError: a launcher has started this process already, or there is no GPU to count.
    """
    if find_launch(os.environ).launcher != "none":
        raise UserError("--ranks starts processes, but a launcher has started this one already: leave it out")
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    ranks = count or torch.cuda.device_count()
    if not ranks:
        raise UserError("--ranks all: this machine has no GPU; name a number")
    logging.disable()  # this process only waits, and ranks report their errors themselves
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_STOP))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    root = str(Path(scalevit.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="scalevit",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "scalevit", command, *arguments)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _count(text: str) -> int:
    """0 for "all"."""
    return 0 if text == "all" else integer(1)(text)
