"""Matches the hidden units of two MLPs: their order in an MLP has no meaning, so equal MLPs may list them differently.

Knows MLPs by their views. Must not know blocks or models.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from scalevit.models.mlps import MlpView


def matching_units(reference: MlpView, other: MlpView) -> Tensor:
    """(hidden,) int64: for each unit of `reference`, the unit of `other` that takes its place.

    The one-to-one assignment of the largest sum of cosines between the units' weights (rows of the first layers with
    biases, and column of fc2); as in Ainsworth et al., arXiv:2209.04836, section 3.1, for one layer.

    Args:
        reference, other: with the same shapes.
    """
    one, two = (normalize(view.unit_vectors().double(), dim=1) for view in (reference, other))
    _, columns = linear_sum_assignment((one @ two.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(one.device)
