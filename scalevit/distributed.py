"""This process among the ranks of a run: rank, device, the process group, and agreement between ranks."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalevit.errors import UserError
from scalevit.launchers import find_launch


@dataclass(frozen=True)
class World:
    """Rank and device of this process. Built before any process group, so that mistakes are found first."""

    rank: int
    size: int
    local_rank: int
    ranks_per_node: int
    device: torch.device
    address: str | None = None
    """Host of rank 0, where the launcher's variables name it but MASTER_ADDR does not."""
    port: int | None = None
    """On which rank 0 listens, likewise."""

    @classmethod
    def from_environment(cls) -> "World":
        """As the launcher started this process, see `launchers`.

        Raises:
            UserError: the variables of launchers are incomplete or contradict each other, or there is no GPU for this
                rank.
        """
        launch = find_launch(os.environ)
        return cls(
            rank=launch.rank,
            size=launch.size,
            local_rank=launch.local_rank,
            ranks_per_node=launch.ranks_per_node,
            device=_device(launch.local_rank),
            address=launch.address,
            port=launch.port,
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """For records: the name of the GPU, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @contextmanager
    def process_group(self, *, offloads: bool = False, timeout_seconds: float = 1800.0) -> Iterator[None]:
        """NCCL on GPUs, gloo on CPUs, for as long as the block runs.

        Args:
            offloads: parameters are kept in the CPU's memory, and gloo sends them from there.
            timeout_seconds: after which a rank stops waiting for its peers.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        on_gpu = "cpu:gloo,cuda:nccl" if offloads else "nccl"
        with self._rendezvous_variables():
            dist.init_process_group(
                on_gpu if self.device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_seconds),
                device_id=self.device if self.device.type == "cuda" else None,
            )
            yield
        # Not after an error: peers may be waiting in an operation that tearing down would wait for.
        dist.destroy_process_group()

    @contextmanager
    def _rendezvous_variables(self) -> Iterator[None]:
        """torch's and DeepSpeed's variables, where the launcher did not set them; removed after the block, since a
        process that still has them looks like a rank to whatever it does or starts next.
        """
        before = dict(os.environ)
        own = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "MASTER_ADDR": self.address or "127.0.0.1",
            **({} if self.port is None else {"MASTER_PORT": self.port}),
        }
        for key, value in own.items():
            os.environ.setdefault(key, str(value))
        if self.size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # Nobody has to find it, and the launchers' default is taken as soon as two runs share a machine. Under
            # torchrun the port is that of the agent's store, which serves every rank: another one has no server.
            os.environ["MASTER_PORT"] = str(_free_port())
        try:
            yield
        finally:
            for key in [*own, "MASTER_PORT"]:
                if key in before:
                    os.environ[key] = before[key]
                else:
                    os.environ.pop(key, None)

    def free_memory_bytes(self) -> int | None:
        """Of this rank's GPU; None on a CPU, whose memory all ranks share."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def memory_bytes(self) -> int | None:
        """Of this rank's GPU in all; None on a CPU."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None

    def peak_memory_bytes(self) -> int:
        """The most that this rank's GPU had allocated at any time; on a CPU, the most that this process had in RAM."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place, on the device's process group."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """If any rank raises a `UserError` in the block, every rank raises the first one at its end.

        Collective. Without it the others would wait in a collective operation for a rank that has ended.
        """
        problem: str | None = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        if self.any(problem is not None):
            problems: list[str | None] = [problem] * self.size
            if self.size > 1:
                dist.all_gather_object(problems, problem)
            raise UserError(next(text for text in problems if text is not None))

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' items, in the order of the ranks, on every rank. Collective; cheap if no rank has any."""
        if not self.any(bool(items)):
            return []
        everyone: list[list[Any]] = [items] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, items)
        return [item for part in everyone for item in part]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def check_equal_across_ranks(self, what: str, value: str | None) -> None:
        """Makes sure that all ranks have the same value. Collective.

        Raises:
            UserError: on every rank, where one differs from the first.
        """
        found: list[str | None] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise UserError(
                    f"{what} is {other} on rank {rank} and {found[0]} on rank 0: output_dir must be one folder that "
                    "all nodes share"
                )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item() > 0)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each rank its own GPU only.
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise UserError(f"local rank {local_rank} has no GPU: this node shows {count}; start at most one rank per GPU")
    return torch.device("cuda", local_rank if count > 1 else 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
