"""The EMA against its definition and against timm's ModelEmaV3."""

from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3

from scalevit.config.model import ModelConfig
from scalevit.config.training import EmaConfig
from scalevit.models.build import build_model
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.training.ema import Ema
from scalevit.tying import uses_per_parameter

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, num_classes=7, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}
)
DECAY = 0.9


def trajectories() -> tuple[torch.nn.Module, Ema, Ema, ModelEmaV3]:
    model = build_model(MODEL, GroupedReduction(), seed=1)
    local = dict(model.named_parameters())
    config = EmaConfig(decay=DECAY)
    once, per_use = Ema(local, config), Ema(local, config, uses_per_parameter(model))
    theirs = ModelEmaV3(model, decay=DECAY)
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        for ema in (once, per_use):
            ema.update(dict(model.named_parameters()), step + 1)
        theirs.update(model)
    return model, once, per_use, theirs


def test_every_parameter_decays_once_and_per_use_is_timms() -> None:
    model, once, per_use, theirs = trajectories()
    shadow = theirs.module.state_dict()
    uses = uses_per_parameter(model)
    assert set(once.tensors) == set(uses)
    for name, tensor in per_use.tensors.items():
        # timm takes two small steps where this takes their product: the same up to rounding.
        torch.testing.assert_close(tensor, shadow[name], rtol=1e-5, atol=1e-5)
        same = torch.allclose(once.tensors[name], shadow[name], rtol=1e-5, atol=1e-5)
        assert same == (uses[name] == 1), f"{name}: timm updates what {uses[name]} blocks use {uses[name]} times"


def test_the_average_is_its_definition() -> None:
    weights = {"w": torch.tensor([1.0, 2.0])}
    ema = Ema(weights, EmaConfig(decay=0.75))
    ema.update({"w": torch.tensor([5.0, 10.0])}, 1)
    assert ema.tensors["w"].tolist() == [2.0, 4.0]
    assert weights["w"].tolist() == [1.0, 2.0], "the average is a copy"


@pytest.mark.parametrize(
    "settings", [{}, {"gamma": 3.0, "power": 0.75}, None], ids=["warm-up", "other numbers", "none"]
)
def test_the_decay_and_the_start_are_timms(settings: dict[str, float] | None) -> None:
    """At every step of a trainer that counts them from 1."""
    warmup = {f"warmup_{key}": value for key, value in (settings or {}).items()}
    timms = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.9, use_warmup=settings is not None, **warmup)
    ema = Ema({"w": torch.zeros(1)}, EmaConfig(decay=0.9, warmup=settings is not None, start="first_step", **warmup))
    for step in range(1, 60):
        assert ema.decay_at(step) == pytest.approx(timms.get_decay(step), abs=1e-12), step
    assert Ema({}, EmaConfig(decay=0.9)).decay_at(1) == 0.9, "it starts at the initial weights"


@pytest.mark.parametrize(("choice", "value"), [("ignore", 4.0), ("average", 2.0)])
def test_a_skipped_step_counts_as_configured(choice: Any, value: float) -> None:
    ema = Ema({"w": torch.tensor([4.0])}, EmaConfig(decay=0.5, skipped_steps=choice))
    ema.update({"w": torch.zeros(1)}, 1, skipped=True)
    assert ema.tensors["w"].tolist() == [value]
