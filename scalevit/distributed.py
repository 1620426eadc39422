"""This process among the ranks of a run: rank, device, the process group, and agreement between ranks.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; plain `python` sets none and
is a world of one rank.
"""

import os
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


@dataclass(frozen=True)
class World:
    """Rank and device of this process. Built before any process group, so that mistakes are found first."""

    rank: int
    size: int
    local_rank: int
    ranks_per_node: int
    device: torch.device

    @classmethod
    def from_environment(cls) -> "World":
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=size,
            local_rank=local_rank,
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size))),
            device=torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu"),
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
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for key, value in alone.items():
            os.environ.setdefault(key, value)
        if self.size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # Nobody has to find it, and the launchers' default is taken as soon as two runs share a machine. Under
            # torchrun the port is that of the agent's store, which serves every rank: another one has no server.
            os.environ["MASTER_PORT"] = str(_free_port())
        on_gpu = "cpu:gloo,cuda:nccl" if offloads else "nccl"
        dist.init_process_group(
            on_gpu if self.device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=self.device if self.device.type == "cuda" else None,
        )
        yield
        # Not after an error: peers may be waiting in an operation that tearing down would wait for.
        dist.destroy_process_group()

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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
