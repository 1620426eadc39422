"""How alike the MLPs of neighbouring blocks are: their weights, and what they make of the same inputs.

Sums over tokens only. Knows models and samples. Must not know files.
"""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from scalevit.analysis.hidden_units import Covariance
from scalevit.models.mlps import MlpView, mlp_views
from scalevit.models.unit_matching import matching_units
from scalevit.models.watching import MlpUse, watch_mlps


class WeightSimilarity(NamedTuple):
    """Of two MLPs of the same shapes: cosines between all their weights, from -1 to 1."""

    as_listed: float
    """Hidden units in the order that they have."""
    matched: float
    """Hidden units of one in the order that fits the other best: 1 for MLPs that are equal up to that order."""


class OutputSimilarity(NamedTuple):
    """Of a block's MLP and that of the next block, on the inputs that the next block's has."""

    cka: float
    """Linear centred kernel alignment of the outputs, from 0 to 1 for outputs that are equal up to a rotation, a factor
    and an offset. Source: Kornblith et al., arXiv:1905.00414, equation 3 with linear kernels."""
    relative_error: float
    """|difference of the outputs| / |outputs of the next block's own MLP|: 0 if they are equal."""


def weight_similarity(one: MlpView, other: MlpView) -> WeightSimilarity | None:
    """None for MLPs of different shapes."""
    if one.shapes != other.shapes:
        return None
    here, there = one.unit_vectors().double(), other.unit_vectors().double()
    order = matching_units(one, other)
    return WeightSimilarity(*(float(cosine_similarity(here.flatten(), x.flatten(), 0)) for x in (there, there[order])))


def weight_similarities(network: nn.Module) -> list[WeightSimilarity | None]:
    """Of each block and the next one, by their first MLPs; None where they have none that can be compared."""
    views = mlp_views(network)
    return [
        weight_similarity(views[block][0], views[block + 1][0]) if views[block] and views[block + 1] else None
        for block in range(len(views) - 1)
    ]


def output_similarities(network: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> list[OutputSimilarity | None]:
    """Of each block and the next one, by their first MLPs; None where they have none that takes the same inputs.

    Args:
        network: in evaluation mode.
        batches: of images, (b, C, H, W).
    """
    views = mlp_views(network)
    together = {
        block: Covariance()
        for block in range(len(views) - 1)
        if views[block] and views[block + 1] and views[block][0].width == views[block + 1][0].width
    }
    # Copies, which are not watched when they run inside the pass.
    others = {block: copy.deepcopy(views[block][0].module) for block in together}
    errors = dict.fromkeys(together, 0.0)
    sizes = dict.fromkeys(together, 0.0)

    def add(use: MlpUse) -> None:
        block = use.block - 1
        if use.index == 0 and block in together:
            other = others[block](use.inputs)
            together[block].add(torch.cat([other, use.output], dim=1))
            errors[block] += float((other - use.output).double().square().sum())
            sizes[block] += float(use.output.double().square().sum())

    for images in batches():
        watch_mlps(network, images, add)
    return [
        OutputSimilarity(_cka(together[block]), (errors[block] / sizes[block]) ** 0.5) if block in together else None
        for block in range(len(views) - 1)
    ]


def _cka(together: Covariance) -> float:
    """Of the first half of the features and the second."""
    covariance = together.centred()
    half = len(covariance) // 2
    cross = covariance[:half, half:].norm() ** 2
    return float(cross / (covariance[:half, :half].norm() * covariance[half:, half:].norm()))
