"""What a trained model loses when one of its MLPs is given up: shared with the next block, or narrowed to half.

Knows models and samples. Must not know files.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalevit.analysis.samples import Samples
from scalevit.models.mlps import MlpView, mlp_places, mlp_views, transformer_blocks
from scalevit.models.reductions.fit import Batches, reduce_trained
from scalevit.models.reductions.method import FitMethod


class Change(NamedTuple):
    """How a changed model differs from the one before, over some images."""

    loss: float
    """Cross-entropy after minus before."""
    top1: float
    """Percentage points, after minus before."""
    divergence: float
    """Mean of KL(before, after) of the class probabilities, in nats: 0 for equal outputs. Needs no label."""


@dataclass(frozen=True)
class Outputs:
    """What a model says of labelled images."""

    log_probabilities: Tensor
    """(N, classes) fp64, on the CPU."""
    labels: Tensor
    """(N,) int64."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(-self.log_probabilities.gather(1, self.labels[:, None]).mean())

    @property
    def top1(self) -> float:
        """In percent."""
        return float(100 * (self.log_probabilities.argmax(1) == self.labels).double().mean())

    def change_to(self, after: "Outputs") -> Change:
        """From these outputs to those of another model for the same images."""
        before = self.log_probabilities
        divergence = (before.exp() * (before - after.log_probabilities)).sum(1).mean()
        return Change(after.loss - self.loss, after.top1 - self.top1, float(divergence))


@torch.no_grad()
def outputs_of(network: nn.Module, samples: Samples) -> Outputs:
    """The outputs of a model in evaluation mode for all samples."""
    logits = torch.cat([network(images).double().cpu() for images in samples.image_batches()])
    return Outputs(logits.log_softmax(1), samples.labels)


def pair_changes(
    network: nn.Module,
    method: FitMethod,
    calibration: Batches,
    samples: Samples,
    *,
    on_block: Callable[[int], None] = lambda block: None,
) -> list[Change | None]:
    """For each block but the last: the change if it shares an MLP with the next one and nothing else is reduced.

    None where the two share one already, or have MLPs that cannot be shared.

    Args:
        network: in evaluation mode.
        method: with which the pair is reduced, on the calibration images.
        samples: on which the change is measured.
        on_block: called before each.
    """
    examples = [_sharing(network, block) for block in range(len(mlp_views(network)) - 1)]
    return _changes(network, examples, method, calibration, samples, on_block)


def half_changes(
    network: nn.Module,
    method: FitMethod,
    calibration: Batches,
    samples: Samples,
    *,
    on_block: Callable[[int], None] = lambda block: None,
) -> list[Change | None]:
    """For each block: the change if its MLP keeps half of its hidden units and nothing else is reduced. None without an
    MLP. Arguments as for `pair_changes`.
    """
    examples = [_narrowed(network, block) for block in range(len(mlp_views(network)))]
    return _changes(network, examples, method, calibration, samples, on_block)


def _changes(
    network: nn.Module,
    examples: Sequence[nn.Module | None],
    method: FitMethod,
    calibration: Batches,
    samples: Samples,
    on_block: Callable[[int], None],
) -> list[Change | None]:
    before = outputs_of(network, samples)
    found: list[Change | None] = []
    for block, example in enumerate(examples):
        on_block(block)
        reduced = None if example is None else reduce_trained(network, example, method, calibration)
        found.append(None if reduced is None else before.change_to(outputs_of(reduced, samples)))
    return found


def _sharing(network: nn.Module, block: int) -> nn.Module | None:
    """A copy in which the next block, with the blocks that use its MLPs too, uses this block's."""
    example = copy.deepcopy(network)
    views = mlp_views(example)
    here, there = views[block], views[block + 1]
    if not here or [view.shapes for view in here] != [view.shapes for view in there]:
        return None
    if all(one.module is other.module for one, other in zip(here, there, strict=True)):
        return None
    takes = {other.module: one.module for one, other in zip(here, there, strict=True)}
    for place in (place for other in transformer_blocks(example) for place in mlp_places(other)):
        place.put(takes.get(place.module, place.module))
    return example


def _narrowed(network: nn.Module, block: int) -> nn.Module | None:
    example = copy.deepcopy(network)
    views: list[MlpView] = mlp_views(example)[block]
    for view in views:
        view.narrow(max(1, view.hidden // 2))
    return example if views else None


def least_damaging_pairs(divergences: Sequence[float | None], count: int) -> list[list[int]] | None:
    """That many pairs of neighbouring blocks without a common block, of the smallest sum of divergences.

    The sum takes pairs as independent, which they are not quite: a later pair sees the outputs of an earlier one.

    Args:
        divergences: of the pairs (0, 1), (1, 2), ...; None for a pair that cannot be chosen.

    Returns:
        None if there are not so many.
    """
    # best[n]: least sum and its pairs among the blocks seen so far, with n pairs; `before` is that without the last.
    best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
    before = dict(best)
    for block, divergence in enumerate(divergences):
        following = dict(best)
        if divergence is not None:
            for pairs, (total, chosen) in before.items():
                candidate = total + divergence, [*chosen, [block, block + 1]]
                following[pairs + 1] = min(following.get(pairs + 1, candidate), candidate)
        before, best = best, following
    return best[count][1] if count in best else None


def least_damaging_blocks(divergences: Sequence[float | None], count: int) -> list[int] | None:
    """That many blocks of the smallest divergences, in ascending order; None if there are not so many."""
    possible = sorted((value, block) for block, value in enumerate(divergences) if value is not None)
    return sorted(block for _, block in possible[:count]) if len(possible) >= count else None
