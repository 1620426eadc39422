"""A short training run with shared MLPs, fused against eager from the same start."""

from __future__ import annotations

import copy

import torch
from scalevit.kernels import eager_mlp, fused_mlp
from torch import nn


class Blocks(nn.Module):
    """Residual MLPs, two of them one module, ending in class scores."""

    def __init__(self, mlp, d: int, h: int, classes: int = 10) -> None:
        super().__init__()
        self.mlp = mlp
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.fc1s = nn.ModuleList(nn.Linear(d, h) for _ in range(2))
        self.fc2s = nn.ModuleList(nn.Linear(h, d) for _ in range(2))
        self.head = nn.Linear(d, classes)

    def forward(self, x):
        for norm, i in zip(self.norms, (0, 0, 1), strict=True):
            a, b = self.fc1s[i], self.fc2s[i]
            x = x + self.mlp(norm(x), a.weight, a.bias, b.weight, b.bias)
        return self.head(x.mean(1))


def train(model: Blocks, steps: int, device: str, dtype: torch.dtype, batch: int) -> torch.Tensor:
    """The loss of each step, on a fixed stream of separable random images under autocast."""
    generator = torch.Generator().manual_seed(3)
    d = model.head.in_features
    centres = torch.randn(10, 16, d, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        labels = torch.randint(10, (batch,), generator=generator)
        x = centres[labels] * 0.2 + torch.randn(batch, 16, d, generator=generator)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(x.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float().cpu())
    return torch.stack(losses)


def permuted(model: Blocks) -> Blocks:
    """The same function with its hidden units in another order: eager sums in another order, no more."""
    other = copy.deepcopy(model)
    for a, b in zip(other.fc1s, other.fc2s, strict=True):
        order = torch.randperm(a.out_features, generator=torch.Generator().manual_seed(5)).to(a.weight.device)
        with torch.no_grad():
            a.weight.copy_(a.weight[order])
            a.bias.copy_(a.bias[order])
            b.weight.copy_(b.weight[:, order])
    return other


def parity(
    device: str, dtype: torch.dtype, steps: int, d: int = 192, h: int = 768, batch: int = 64
) -> tuple[float, float, torch.Tensor]:
    """Largest difference of smoothed losses: fused to eager, and eager to eager summed in another order."""
    torch.manual_seed(0)
    start = Blocks(eager_mlp, d, h).to(device)
    runs = []
    for model, mlp in ((start, eager_mlp), (permuted(start), eager_mlp), (start, fused_mlp)):
        mine = copy.deepcopy(model)
        mine.mlp = mlp
        runs.append(train(mine, steps, device, dtype, batch))
    window = min(20, steps)
    eager, reordered, fused = (r.unfold(0, window, 1).mean(1) for r in runs)
    return (fused - eager).abs().max().item(), (reordered - eager).abs().max().item(), eager
