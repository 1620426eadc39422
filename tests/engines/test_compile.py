"""torch.compile of the blocks: all of them, under their own names, whatever their rates of drop-path."""

from typing import Any

import pytest
import torch

from parity_worker import micro_batch, tiny_model
from scalevit.config.model import KernelsConfig
from scalevit.engines.base import compile_blocks
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.models.mlps import transformer_blocks


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def test_every_block_is_compiled_and_keeps_its_name() -> None:
    depth = 10  # more programs than the compiler keeps by default
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = tiny_model("grouped", depth)
    blocks = transformer_blocks(model)
    fuse_mlps(model, KernelsConfig(), torch.device("cpu"))
    names = list(model.state_dict())
    expected = _train(model)
    compile_blocks(blocks, backend)
    assert list(model.state_dict()) == names
    gradients = _train(model)
    assert len(graphs) == depth, "each drop-path rate is a program, none breaks in two, and none is left out"
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), "the same drop-path, the same arithmetic"
    _train(model)
    assert len(graphs) == depth, "compiled once"


def _train(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    images, _ = micro_batch(0, 0)
    model.train()(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("mode", "asked"), [("default", None), ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs")]
)
def test_a_mode_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch, mode: Any, asked: str | None) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: seen.append(options) or forward)
    compile_blocks([torch.nn.Identity(), torch.nn.Identity()], "inductor", mode)
    assert seen == [{"backend": "inductor", "mode": asked}] * 2
    assert asked is None or asked in torch._inductor.list_mode_options()
