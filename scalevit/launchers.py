"""Rank, world size and address of this process, from the variables of whichever launcher started it.

deepspeed and torchrun set RANK, WORLD_SIZE and LOCAL_RANK; srun SLURM_PROCID and others; Open MPI's mpirun
OMPI_COMM_WORLD_RANK and others; MPICH's and Intel's PMI_RANK and others; plain python none. Must not know torch.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scalevit.errors import UserError

# Ports for runs whose launcher names none; the same for all ranks of a job.
_FIRST_PORT, _PORTS = 20_000, 12_000


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    launcher: str
    """"torchrun or deepspeed", "mpirun", "srun" or "none"."""
    rank: int
    size: int
    """Number of ranks."""
    local_rank: int
    """Number among the ranks of this node."""
    ranks_per_node: int
    """Of this node."""
    address: str | None = None
    """Host of rank 0; None: to be found in MASTER_ADDR, or not needed."""
    port: int | None = None
    """On which rank 0 listens; None: to be found in MASTER_PORT, or any."""


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Finds out which launcher started this process.

    A launcher inside another one wins, for example torchrun that srun starts once per node.

    Raises:
        UserError: variables are missing, are no numbers, or contradict each other.
    """
    found = list(_launches(environment))
    if not found:
        return Launch("none", rank=0, size=1, local_rank=0, ranks_per_node=1)
    inner, *others = found
    for outer in others:
        _check_nesting(inner, outer, environment)
    return inner


def reporting_rank(environment: Mapping[str, str]) -> int:
    """The rank for messages: 0 where the variables of launchers are incomplete or contradict each other."""
    try:
        return find_launch(environment).rank
    except UserError:
        return 0


def _launches(environment: Mapping[str, str]) -> Iterator[Launch]:
    """From the innermost launcher to the outermost."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        size = _number(environment, "WORLD_SIZE", beside="RANK")
        per_node = next((key for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if key in environment), None)
        yield _checked(
            Launch(
                "torchrun or deepspeed",
                rank=_number(environment, "RANK", beside="WORLD_SIZE"),
                size=size,
                local_rank=_number(environment, "LOCAL_RANK", beside="RANK") if size > 1 else 0,
                ranks_per_node=_number(environment, per_node) if per_node else size,
            )
        )
    for prefix, names in (
        ("OMPI_COMM_WORLD_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
        ("PMI_", ("RANK", "SIZE", "", "")),
    ):
        if prefix == "PMI_" and "SLURM_STEP_ID" in environment:
            continue  # srun sets them too, and says more
        if prefix + "RANK" in environment:
            yield _mpi(environment, [prefix + name if name else "" for name in names])
    # Without a step, a script of sbatch has some of the variables, but is one process.
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        yield _slurm(environment)


def _mpi(environment: Mapping[str, str], keys: list[str]) -> Launch:
    rank_key, size_key, local_key, local_size_key = keys
    local_key = local_key or "MPI_LOCALRANKID"
    local_size_key = local_size_key or "MPI_LOCALNRANKS"
    size = _number(environment, size_key, beside=rank_key)
    one_node = local_size_key not in environment or _number(environment, local_size_key) == size
    if not one_node and "MASTER_ADDR" not in environment:
        raise UserError(
            "mpirun over several nodes needs the host of rank 0: pass -x MASTER_ADDR=HOST (-genv for MPICH)"
        )
    rank = _number(environment, rank_key)
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or "mpirun"
    return _checked(
        Launch(
            "mpirun",
            rank=rank,
            size=size,
            local_rank=_number(environment, local_key) if local_key in environment else rank,
            ranks_per_node=_number(environment, local_size_key) if local_size_key in environment else size,
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=_port(environment, job),
        )
    )


def _slurm(environment: Mapping[str, str]) -> Launch:
    rank = _number(environment, "SLURM_PROCID")
    size = _number(environment, "SLURM_NTASKS", beside="SLURM_PROCID")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if size > 1 and not nodes and "MASTER_ADDR" not in environment:
        raise UserError("SLURM_JOB_NODELIST is not set: srun did not start this process; set MASTER_ADDR")
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment['SLURM_STEP_ID']}"
    return _checked(
        Launch(
            "srun",
            rank=rank,
            size=size,
            local_rank=_number(environment, "SLURM_LOCALID", beside="SLURM_PROCID"),
            ranks_per_node=_tasks_of_node(environment, size),
            address=environment.get("MASTER_ADDR") or first_host(nodes) or None,
            port=_port(environment, job),
        )
    )


def _tasks_of_node(environment: Mapping[str, str], size: int) -> int:
    """From "8(x4)" or "8(x3),4", tasks of each node in the order of SLURM_NODEID."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or str(size)
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE = {text!r} is not a list of numbers such as 8(x4)")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    return counts[node] if node < len(counts) else counts[-1]


def first_host(nodes: str) -> str:
    """The first host of a list of Slurm's, e.g. "gpu07" of "gpu[07-09,12],login1".

    Raises:
        UserError: a list in another form.
    """
    match = re.match(r"([A-Za-z0-9._-]*)(?:\[(\d+)[^\]]*\]([A-Za-z0-9._-]*))?(?:,|$)", nodes)
    if match is None:
        raise UserError(f"SLURM_JOB_NODELIST = {nodes!r}: the first host cannot be read; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())


def _port(environment: Mapping[str, str], job: str) -> int:
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT")
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _check_nesting(inner: Launch, outer: Launch, environment: Mapping[str, str]) -> None:
    """Refuses variables that were left over from something else.

    Raises:
        UserError: they contradict.
    """
    if inner.size < outer.size:
        raise UserError(
            f"{inner.launcher} says {inner.size} ranks, but {outer.launcher} started {outer.size} processes: unset the "
            "variables of one of them (RANK, WORLD_SIZE, OMPI_COMM_WORLD_*, SLURM_*)"
        )
    # torchrun numbers its nodes as they arrive.
    if inner.size == outer.size and inner.rank != outer.rank and "TORCHELASTIC_RUN_ID" not in environment:
        raise UserError(
            f"{inner.launcher} says rank {inner.rank}, but {outer.launcher} rank {outer.rank} of {outer.size}: unset "
            "the variables of one of them"
        )


def _checked(launch: Launch) -> Launch:
    if launch.size < 1 or not 0 <= launch.rank < launch.size:
        raise UserError(f"{launch.launcher}: rank {launch.rank} is not one of {launch.size} ranks")
    if not 0 <= launch.local_rank < max(1, launch.ranks_per_node):
        raise UserError(
            f"{launch.launcher}: local rank {launch.local_rank} is not one of {launch.ranks_per_node} ranks of a node"
        )
    return launch


def _number(environment: Mapping[str, str], key: str, *, beside: str | None = None) -> int:
    """
    Args:
        beside: a variable that is set and needs this one.
    """
    if key not in environment:
        raise UserError(
            f"{beside} is set, but {key} is not: start with torchrun, deepspeed, srun or mpirun, or unset it"
        )
    try:
        return int(environment[key])
    except ValueError:
        raise UserError(f"{key} = {environment[key]!r} is not a number") from None
