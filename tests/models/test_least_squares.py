"""The closed form against torch's least squares on all rows at once."""

import pytest
import torch
from torch import Tensor, nn

from scalevit.models.reductions.least_squares import Moments, refitted

ROWS, INPUTS, OUTPUTS = 400, 12, 5


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, INPUTS) @ torch.randn(INPUTS, INPUTS) + 3
    return inputs, torch.randn(ROWS, OUTPUTS) + 0.5 * inputs[:, :OUTPUTS]


def in_batches(inputs: Tensor, targets: Tensor) -> Moments:
    first, *others = [Moments.of(x, y) for x, y in zip(inputs.split(150), targets.split(150), strict=True)]
    for other in others:
        first = first + other
    return first


def direct(inputs: Tensor, targets: Tensor, layer: nn.Linear, ridge: float) -> tuple[Tensor, Tensor]:
    """With the ridge as further rows: sqrt(ridge s) (W - W0) for each input."""
    x, y, start = inputs.double(), targets.double(), layer.weight.detach().double()
    weight = (ROWS * ridge * x.square().mean()).sqrt()
    ones = torch.ones(ROWS, 1, dtype=torch.float64)
    x = torch.cat([x, ones if layer.bias is not None else 0 * ones], 1)
    below = torch.cat([weight * torch.eye(INPUTS), torch.zeros(INPUTS, 1)], 1)
    solution = torch.linalg.lstsq(torch.cat([x, below.double()]), torch.cat([y, weight * start.T])).solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 10.0])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_lstsq_on_all_rows(rows: tuple[Tensor, Tensor], ridge: float, bias: bool) -> None:
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    weight, offset = refitted(layer, in_batches(*rows), ridge)
    expected, expected_offset = direct(*rows, layer, ridge)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(offset, expected_offset if bias else torch.zeros_like(offset), rtol=1e-6, atol=1e-7)


def test_a_target_that_the_layer_gives_already_leaves_it_as_it_is(rows: tuple[Tensor, Tensor]) -> None:
    layer = nn.Linear(INPUTS, OUTPUTS).double()
    inputs = rows[0].double()
    weight, bias = refitted(layer, in_batches(inputs, layer(inputs).detach()), 1e-4)
    torch.testing.assert_close(weight, layer.weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(bias, layer.bias.detach(), rtol=0, atol=1e-12)


def test_directions_that_no_row_shows_keep_the_present_weight(rows: tuple[Tensor, Tensor]) -> None:
    layer = nn.Linear(INPUTS, OUTPUTS)
    inputs = rows[0].clone()
    inputs[:, 3] = 0  # an input that is never used
    inputs[:, 4] = 2.5  # one that is constant
    weight, _ = refitted(layer, in_batches(inputs, rows[1]), 1e-6)
    torch.testing.assert_close(weight[:, 3:5], layer.weight.detach()[:, 3:5].double(), rtol=0, atol=1e-8)
    unused, _ = refitted(layer, in_batches(0 * inputs, rows[1]), 1e-6)
    assert torch.equal(unused, layer.weight.detach().double())
