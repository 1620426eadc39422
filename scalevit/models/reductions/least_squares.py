"""A linear layer fitted to targets by least squares, from sums over rows only: no activations are kept.

Knows tensors and linear layers. Must not know models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Sums over rows of inputs x (rows, H) and targets y (rows, D), in fp64; those of more rows are added."""

    rows: int
    x: Tensor
    """(H,)."""
    y: Tensor
    """(D,)."""
    xx: Tensor
    """(H, H): the Gram matrix."""
    yx: Tensor
    """(D, H)."""

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "Moments":
        """inputs: (rows, H); targets: (rows, D)."""
        x, y = inputs.double(), targets.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.rows + other.rows, self.x + other.x, self.y + other.y, self.xx + other.xx, self.yx + other.yx
        )


@torch.no_grad()
def refitted(layer: nn.Linear, moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """The weight (D, H) and bias (D,) of the best linear map, in fp64; the layer stays as it is.

    With W0 the layer's present weight, they minimise

        mean over rows of |y - (W x + b)|^2  +  ridge * s * |W - W0|^2

    where s is the mean square of the inputs, over rows and inputs. For a layer without bias, b is 0. The
    ridge term draws W to W0, not to 0: directions that the rows hardly show keep what the layer knows.

    Args:
        ridge: above 0; relative to the mean square of the inputs, so it has no unit.
    """
    start = layer.weight.double()
    mean_x, mean_y = moments.x / moments.rows, moments.y / moments.rows
    if layer.bias is None:
        mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
    xx = moments.xx / moments.rows - torch.outer(mean_x, mean_x)
    yx = moments.yx / moments.rows - torch.outer(mean_y, mean_x)
    size = ridge * moments.xx.diagonal().mean() / moments.rows
    if size == 0:  # all inputs are zeros
        return start, mean_y
    change = torch.linalg.solve(xx + size * torch.eye(len(xx)).to(xx), (yx - start @ xx).T).T
    weight = start + change
    return weight, mean_y - weight @ mean_x
