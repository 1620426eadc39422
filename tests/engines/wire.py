"""What a process sends: a count of the process group's own calls."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that one rank of n sends per byte of the largest buffer, in a ring: what reaches the wire on every backend.
_SHARE = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    "allgather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "alltoall": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
}


class WireCounter(TorchDispatchMode):
    """Sees every collective of this process, forward and backward, whoever calls it: they all pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
        if name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(("barrier", "wait_tensor")):
            self._count(name.partition("::")[2].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Any) -> None:
        # reduce_scatter before reduce: the longest name that fits.
        kind = max((kind for kind in _SHARE if operation.startswith(kind)), key=len, default=None)
        assert kind is not None, f"an operation that nobody counts: {operation}"
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        ranks = next(dist.ProcessGroup.unbox(group).size() for group in groups if _is_group(group))
        largest = max(_bytes(arg) for arg in args)
        self.calls[kind] += 1
        self.bytes[kind] += round(_SHARE[kind](ranks) * largest)

    def counts(self) -> dict[str, dict[str, int]]:
        """{operation: {"calls": .., "bytes": ..}}: bytes that this rank sends."""
        return {kind: {"calls": self.calls[kind], "bytes": self.bytes[kind]} for kind in sorted(self.calls)}


def _is_group(handle: Any) -> bool:
    return handle._type().qualified_name().endswith("ProcessGroup")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0
