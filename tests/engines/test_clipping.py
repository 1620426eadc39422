"""Clipping against timm's own functions, whole and of shards. `test_parity` has it inside of engines."""

import torch
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from scalevit.engines.clipping import Clipping

SHAPES = {"weight": (6, 4), "filter": (4, 3, 2, 2), "token": (1, 3, 4), "bias": (6,), "zero": (4,), "head": (4, 5)}


def parameters() -> dict[str, nn.Parameter]:
    """With gradients; some rows are clipped and others are not."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in SHAPES.items():
        value = torch.zeros(shape) if name == "zero" else torch.randn(shape, generator=generator)
        found[name] = nn.Parameter(value)
        found[name].grad = torch.randn(shape, generator=generator) * torch.logspace(-3, 0, shape[0]).view(
            -1, *[1] * (len(shape) - 1)
        )
    return found


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_adaptive_clipping_is_timms_and_leaves_out_the_classifier() -> None:
    ours, theirs, before = parameters(), parameters(), parameters()
    clipping = Clipping(0.1, "agc", frozenset({"head"}))
    clipping.clip_units((name, own, gradient(own)) for name, own in ours.items())
    adaptive_clip_grad([theirs[name] for name in SHAPES if name != "head"], clip_factor=0.1)
    for name in SHAPES:
        assert torch.equal(gradient(ours[name]), gradient(theirs[name])), name
    for name in ("weight", "bias", "head"):
        assert torch.equal(gradient(ours[name]), gradient(before[name])) == (name == "head"), name
    assert not torch.equal(gradient(ours["weight"])[-1], gradient(before["weight"])[-1])
    assert torch.equal(gradient(ours["weight"])[0], gradient(before["weight"])[0]), "a short row stays"


def test_a_vector_is_one_unit_over_all_of_its_shards() -> None:
    """Both ranks' parts in one process: the sum over shards is that of both."""
    whole, theirs = parameters(), parameters()
    adaptive_clip_grad([theirs[name] for name in SHAPES], clip_factor=0.1)
    norms = {name: [whole[name].detach().norm() ** 2, gradient(whole[name]).norm() ** 2] for name in ("bias", "zero")}

    def sum_over_shards(squares: Tensor) -> None:
        squares.copy_(torch.stack([norms[name][place] for place in (0, 1) for name in ("bias", "zero")]))

    def rows(tensor: Tensor, part: int) -> Tensor:
        return tensor.chunk(2)[part] if len(tensor.chunk(2)) > part else tensor[:0]

    for part in (0, 1):
        shards = [(name, rows(p.detach(), part), rows(gradient(p), part)) for name, p in parameters().items()]
        Clipping(0.1, "agc").clip_units(shards, sum_over_shards)
        for name, _, clipped in shards:
            torch.testing.assert_close(clipped, rows(gradient(theirs[name]), part))


def test_only_the_mode_that_is_set_clips() -> None:
    assert Clipping(0.5).factor(2.0) == 0.5 / (2.0 + 1e-6)
    assert Clipping(0.5).factor(0.1) == Clipping(0.5, "value").factor(2.0) == Clipping().factor(2.0) == 1.0
    for clipping in (Clipping(1e-3), Clipping(1e-3, "value"), Clipping(None, "agc")):
        own, before = parameters(), parameters()
        clipping.clip_units((name, p, gradient(p)) for name, p in own.items())
        assert all(torch.equal(gradient(own[name]), gradient(before[name])) for name in SHAPES)
    stepped, free = parameters(), parameters()
    for clipping, found in ((Clipping(0.01, "value"), stepped), (Clipping(0.01, "agc"), free)):
        optimizer = torch.optim.SGD(found.values(), lr=1.0)
        clipping.attach(optimizer)
        optimizer.step()
    start = parameters()
    for name in SHAPES:
        torch.testing.assert_close(start[name] - stepped[name], gradient(start[name]).clamp(-0.01, 0.01))
        torch.testing.assert_close(start[name] - free[name], gradient(start[name]))
