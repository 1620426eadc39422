"""What the hidden units of each block's MLP do over some images: their rank, and how importance is spread over them.

Sums over tokens only: no activations are kept. Knows models and samples. Must not know files.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalevit.models.mlps import mlp_views
from scalevit.models.watching import MlpUse, watch_mlps


@dataclass
class Covariance:
    """Of rows that are added batch by batch, in fp64."""

    rows: int = 0
    total: Tensor | None = None
    gram: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """values: (rows, features)."""
        x = values.double()
        total, gram = x.sum(0), x.T @ x
        self.rows += len(x)
        self.total = total if self.total is None else self.total + total
        self.gram = gram if self.gram is None else self.gram + gram

    def centred(self) -> Tensor:
        """(features, features): the covariance over all rows."""
        assert self.total is not None, "no rows were added"
        assert self.gram is not None, "no rows were added"
        mean = self.total / self.rows
        return self.gram / self.rows - torch.outer(mean, mean)


@dataclass(frozen=True)
class HiddenUnits:
    """Of one MLP in one block."""

    block: int
    hidden: int
    effective_rank: float
    """Of the hidden activations around their mean."""
    importance: Tensor
    """(hidden,) fp64 on the CPU, in descending order: mean |activation| times the norm of the unit's fc2 column."""

    def share_for(self, part: float) -> float:
        """The share of the hidden units that have a part, e.g. 0.9, of all importance."""
        sums = self.importance.cumsum(0)
        reached = sums >= part * sums[-1]  # the sum by another order of terms may be larger than any of these
        return (int(reached.to(torch.uint8).argmax()) + 1) / self.hidden


def effective_rank(singular_values: Tensor) -> float:
    """exp(entropy) of the singular values over their sum: n for n equal ones, 1 for a single one.

    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007).
    """
    shares = singular_values.double().clamp_min(0)
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def rank_of_weight(weight: Tensor) -> float:
    """The effective rank of a matrix."""
    return effective_rank(torch.linalg.svdvals(weight.detach().double()))


def measure_hidden_units(network: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> list[list[HiddenUnits]]:
    """By block and MLP of the block. Holds (hidden, hidden) numbers in fp64 for each.

    Args:
        network: in evaluation mode.
        batches: of images, (b, C, H, W).
    """
    views = mlp_views(network)
    covariances = [[Covariance() for _ in own] for own in views]
    sizes: list[list[Tensor | int]] = [[0 for _ in own] for own in views]

    def add(use: MlpUse) -> None:
        covariances[use.block][use.index].add(use.hidden)
        sizes[use.block][use.index] = sizes[use.block][use.index] + use.hidden.abs().sum(0, dtype=torch.float64)

    for images in batches():
        watch_mlps(network, images, add)
    found = []
    for block, own in enumerate(views):
        measured = []
        for view, covariance, size in zip(own, covariances[block], sizes[block], strict=True):
            importance = size / covariance.rows * view.output.weight.detach().norm(dim=0)
            # Rounding makes zero eigenvalues slightly negative.
            deviations = torch.linalg.eigvalsh(covariance.centred()).clamp_min(0).sqrt()
            ordered = importance.sort(descending=True).values.double().cpu()
            measured.append(HiddenUnits(block, view.hidden, effective_rank(deviations), ordered))
        found.append(measured)
    return found
