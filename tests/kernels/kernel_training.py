"""A short training run with shared MLPs, fused against eager from the same start.

python tests/kernels/kernel_training.py --output FOLDER [--steps 500]
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
from pathlib import Path

import torch
import triton
from torch import nn

from scalevit.kernels import eager_mlp, fused_mlp


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


def curves(
    device: str, dtype: torch.dtype, steps: int, d: int = 192, h: int = 768, batch: int = 64
) -> dict[str, torch.Tensor]:
    """The losses of three runs from one start: "eager", "reordered" (eager, summed in another order), "fused"."""
    torch.manual_seed(0)
    start = Blocks(eager_mlp, d, h).to(device)
    losses = {}
    for name, model, mlp in (
        ("eager", start, eager_mlp), ("reordered", permuted(start), eager_mlp), ("fused", start, fused_mlp),
    ):  # fmt: skip
        mine = copy.deepcopy(model)
        mine.mlp = mlp
        losses[name] = train(mine, steps, device, dtype, batch)
    return losses


def differences(losses: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference of smoothed losses: fused to eager, and eager to eager summed in another order."""
    smooth = {name: run.unfold(0, min(20, len(run)), 1).mean(1) for name, run in losses.items()}
    fused, reordered = ((smooth[name] - smooth["eager"]).abs().max().item() for name in ("fused", "reordered"))
    return fused, reordered


# What the smoothed losses of two runs may differ by when the one pair's spread happens to be nothing. In bf16 and fp16
# every activation is rounded to 3 or 4 digits, and a loss (near 2.3 at first) is sure to about 1e-3. In fp32 a loss has
# steps of 2e-7; the spread of reordered sums is a few of them, and forty are still a hundred times less than 1e-3.
SLACK = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def agree(losses: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether fused differs from eager no more than eager from itself.

    One pair of eager runs estimates that spread; three times it is what a second pair could well differ by.
    """
    fused, spread = differences(losses)
    return fused <= 3 * spread + SLACK[dtype]


def main() -> int:
    """Writes parity.json, parity.csv and, if matplotlib is installed, parity.png; status 1 if a dtype disagrees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, runs = [], {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        runs[name] = losses = curves(arguments.device, dtype, arguments.steps)
        fused, spread = differences(losses)
        rows.append({"dtype": name, "fused_to_eager": fused, "eager_to_eager": spread, "agree": agree(losses, dtype)})
        print(rows[-1], flush=True)
        device = torch.cuda.get_device_name(0) if arguments.device == "cuda" else arguments.device
        about = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "steps": arguments.steps}
        (arguments.output / "parity.json").write_text(json.dumps(about | {"runs": rows}, indent=1) + "\n")
        with open(arguments.output / "parity.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *(f"{kind}_{n}" for n, run in runs.items() for kind in run)])
            columns = (values.tolist() for run in runs.values() for values in run.values())
            writer.writerows(zip(range(arguments.steps), *columns, strict=True))
    plot(runs, arguments.output / "parity.png")
    return 0 if all(row["agree"] for row in rows) else 1


def plot(runs: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no figure is drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(4 * len(runs), 3), sharey=True, squeeze=False)
    for axis, (dtype, losses) in zip(axes[0], runs.items(), strict=True):
        for name, values in losses.items():
            axis.plot(values, label=name, linewidth=0.8)
        axis.set_title(dtype)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("loss")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
