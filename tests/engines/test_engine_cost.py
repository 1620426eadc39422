"""The engines' `cost` on shapes. tests/planning/test_accounting.py compares it with real ranks."""

import pytest

from scalevit.config.model import ModelConfig
from scalevit.engines.cost import EngineCost, ParameterLayout, Workload, parameter_bytes
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.engines.settings import EngineSettings
from scalevit.models.build import build_model
from scalevit.models.freezing import freeze
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction

KINDS = [*DeepSpeedSettings().variants(), *FsdpSettings().variants()]


def layout(reduction: Reduction) -> ParameterLayout:
    model = build_model(ModelConfig(), reduction, seed=0, device="meta")
    return ParameterLayout.of(model, transformer_blocks(model))


def cost(engine: EngineSettings, parameters: ParameterLayout, ranks: int = 8) -> EngineCost:
    return engine.cost(parameters, Workload(ranks, accumulation=1, optimizer_tensors=2, ema=True))


def test_a_layout_counts_each_parameter_once_and_blocks_that_share_as_one_unit() -> None:
    none, grouped = layout(NoReduction()), layout(GroupedReduction())
    assert (len(none.units), len(grouped.units)) == (12, 6)
    assert len(set(grouped.parameters)) == len(grouped.parameters)
    assert parameter_bytes(grouped.reused) == parameter_bytes(none.parameters) - parameter_bytes(grouped.parameters)
    assert none.reused == []


@pytest.mark.parametrize("engine", KINDS, ids=lambda engine: engine.label)
def test_grouped_vit_base_sends_a_third_less(engine: EngineSettings) -> None:
    none, grouped = (cost(engine, layout(reduction)) for reduction in (NoReduction(), GroupedReduction()))
    # FSDP2 shards rows: a position embedding (1, 197, 768) is padded to one row per rank, in both models.
    tolerance = 0.005 if isinstance(engine, FsdpSettings) else 0.0006
    assert 1 - grouped.traffic.gradients / none.traffic.gradients == pytest.approx(0.327, abs=tolerance)
    assert grouped.traffic.bytes_sent(8) <= 0.678 * none.traffic.bytes_sent(8)
    assert grouped.memory.weights < none.memory.weights


def test_one_rank_sends_nothing() -> None:
    parameters = layout(GroupedReduction())
    for engine in KINDS:
        assert cost(engine, parameters, ranks=1).traffic.bytes_sent(1) == 0, engine.label


@pytest.mark.parametrize("engine", KINDS, ids=lambda engine: engine.label)
def test_frozen_parameters_cost_weights_only(engine: EngineSettings) -> None:
    model = build_model(ModelConfig(), NoReduction(), seed=0, device="meta")
    whole = cost(engine, ParameterLayout.of(model, transformer_blocks(model)))
    freeze(model, "backbone")
    probe = cost(engine, ParameterLayout.of(model, transformer_blocks(model)))
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters())
    assert probe.memory.weights == whole.memory.weights
    for small, large in (
        (probe.memory.optimizer, whole.memory.optimizer),
        (probe.memory.gradients, whole.memory.gradients),
        (probe.traffic.gradients, whole.traffic.gradients),
        (probe.updated_bytes, whole.updated_bytes),
    ):
        # FSDP2 pads the first dimension of each parameter to the number of ranks.
        assert small == pytest.approx(share * large, rel=0.02)


def test_labels_tell_the_kinds_of_sharding_apart() -> None:
    labels = [engine.label for engine in KINDS]
    assert labels == ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2"]
    assert FsdpSettings(shard_size=4).label == "HSDP, 4 shards"


def test_variants_keep_the_own_settings_that_another_stage_has() -> None:
    zero = {"zero_optimization": {"reduce_bucket_size": 1000}}
    own = DeepSpeedSettings(stage=1, overlap_comm=True, offload_optimizer="cpu", native=zero)
    variants = {variant.label: variant for variant in own.variants()}
    assert variants["ZeRO 1"] is own
    assert [variants[f"ZeRO {stage}"].overlaps_communication for stage in range(4)] == [False, True, True, True]
    assert all(isinstance(v, DeepSpeedSettings) and v.native == zero for v in variants.values())
    # A native setting that only stage 0 has is refused by the others.
    scaled = DeepSpeedSettings(stage=0, native={"prescale_gradients": True}).variants()
    assert [v.native for v in scaled if isinstance(v, DeepSpeedSettings)] == [{"prescale_gradients": True}, {}, {}, {}]


def test_settings_that_the_cost_leaves_out_are_named() -> None:
    assert all(engine.not_estimated == [] for engine in KINDS)
    offloading = DeepSpeedSettings(stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert offloading.not_estimated == ["offload_optimizer", "offload_parameters"]
    assert FsdpSettings(prefetch=2, mixed_precision="policy").not_estimated == ["prefetch", "mixed_precision"]
