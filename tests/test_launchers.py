"""Ranks from the variables that launchers set, as recorded from their documentation and from runs."""

import pytest

from scalevit.errors import UserError
from scalevit.launchers import Launch, find_launch, first_host, reporting_rank

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "8,4",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def numbers(launch):
    return launch.rank, launch.size, launch.local_rank, launch.ranks_per_node


@pytest.mark.parametrize(
    ("environment", "launcher", "expected"),
    [
        ({}, "none", (0, 1, 0, 1)),
        (TORCHRUN, "torchrun or deepspeed", (3, 8, 1, 2)),
        (DEEPSPEED, "torchrun or deepspeed", (3, 8, 3, 4)),
        (SLURM, "srun", (9, 12, 1, 4)),
        (OPEN_MPI, "mpirun", (1, 2, 1, 2)),
        (MPICH, "mpirun", (1, 2, 1, 2)),
        (SLURM | {"PMI_RANK": "9", "PMI_SIZE": "12"}, "srun", (9, 12, 1, 4)),
    ],
)
def test_every_launcher(environment, launcher, expected):
    launch = find_launch(environment)
    assert launch.launcher == launcher
    assert numbers(launch) == expected


def test_slurm_names_the_first_host_and_a_port_of_the_job():
    launch = find_launch(SLURM)
    assert launch.address == "gpu07"
    assert 20_000 <= launch.port < 32_000
    assert find_launch(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == launch.port
    assert find_launch(SLURM | {"SLURM_STEP_ID": "1"}).port != launch.port
    given = find_launch(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (given.address, given.port) == ("head", 1234)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a-1,b-2", "a-1"),
        ("rack2-gpu[1,3]-ib", "rack2-gpu1-ib"),
        ("node.site.org", "node.site.org"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_script_of_sbatch_is_one_process():
    assert find_launch({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).size == 1


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        # torchrun on each of two nodes, started by srun; it numbers nodes as they arrive
        (TORCHRUN, SLURM | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)",
                            "SLURM_LOCALID": "0"}, (3, 8, 1, 2)),
        (TORCHRUN | {"WORLD_SIZE": "2", "RANK": "1"}, SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2",
                     "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x2)"}, (1, 2, 1, 2)),
        # mpirun in an allocation starts its own daemons by srun
        (OPEN_MPI, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (1, 2, 1, 2)),
    ],
)  # fmt: skip
def test_launchers_in_launchers(inner, outer, expected):
    assert numbers(find_launch(inner | outer)) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK is not"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is not one of 8"),
        ({**TORCHRUN, "RANK": "x"}, "RANK = 'x' is not a number"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 is not one of 2"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, "says 1 ranks, but srun started 12"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "says rank 0, but mpirun rank 1"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "many"}, "SLURM_TASKS_PER_NODE = 'many'"),
        ({**SLURM, "SLURM_JOB_NODELIST": "[bad"}, "first host cannot be read"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "pass -x MASTER_ADDR"),
    ],
)
def test_contradictions_are_refused_in_one_line(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        find_launch(environment)
    assert "\n" not in str(caught.value)


def test_the_rank_of_messages_needs_no_consistent_variables():
    assert [reporting_rank(each) for each in (SLURM, OPEN_MPI, TORCHRUN, {}, {"RANK": "x"}, {"RANK": "3"})] == [
        9, 1, 3, 0, 0, 0
    ]  # fmt: skip


def test_alone_needs_no_address():
    assert find_launch({}) == Launch("none", 0, 1, 0, 1)
