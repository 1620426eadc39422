"""Two gloo ranks: fused_mlp under DDP and FSDP2 gives one process's gradients, with shared weights too."""

import os
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch import nn

from scalevit.kernels import fused_mlp

TOKENS, D, H = 12, 16, 32


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.randn(H, D) / D**0.5)
        self.fc1_bias = nn.Parameter(torch.randn(H))
        self.fc2_weight = nn.Parameter(torch.randn(D, H) / H**0.5)
        self.fc2_bias = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return fused_mlp(x, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias, backend="triton")


class Shared(nn.Module):
    """Two residual blocks whose MLP is one module, and one block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = Mlp(), Mlp()

    def forward(self, x):
        y = self.shared(x)
        y += x
        x = y + self.shared(y)
        return x + self.own(x)


def build() -> tuple[Shared, torch.Tensor]:
    torch.manual_seed(0)
    return Shared(), torch.randn(2 * TOKENS, D)


def train(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        for wrap in ("ddp", "fsdp2"):
            check(rank, wrap)
    except BaseException:
        dist.destroy_process_group()
        raise
    # FSDP2 keeps the process group, and gloo's threads live on. One that still wants to release a tensor while Python
    # 3.13 or older ends would abort the process, after everything passed: so this rank ends without that.
    dist.barrier()
    os._exit(0)


def check(rank: int, wrap: str) -> None:
    reference, x = build()
    reference(x).square().mean().backward()
    model, _ = build()
    if wrap == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.shared, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    with warnings.catch_warnings():
        # FSDP2 warns of a module whose output is a view: an addition to it in place would drop its backward hook.
        warnings.filterwarnings("error", message=".*returned a view tensor")
        y = wrapped(x[rank * TOKENS : (rank + 1) * TOKENS].view(3, TOKENS // 3, D))
    y.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        grad = p.grad if wrap == "ddp" else p.grad.full_tensor()
        # The halves' means are averaged in fp32 in another order than one mean over all.
        torch.testing.assert_close(grad, q.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{wrap}, {n}: {m}")


def test_two_ranks():
    """With DDP and with FSDP2, in processes that import torch once."""
    with tempfile.NamedTemporaryFile() as file:  # a file to meet at: no port to fight over
        os.unlink(file.name)
        torch.multiprocessing.spawn(train, args=(f"file://{file.name}",), nprocs=2)
        open(file.name, "w").close()
