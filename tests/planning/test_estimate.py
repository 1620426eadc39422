"""`estimate_run` through its seams: it lists every reduction and engine, and uses what they say of themselves."""

from typing import Any, Literal

import pytest

from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.engines import ENGINES
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.errors import SettingError
from scalevit.models.reductions import REDUCTIONS
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.planning import estimate
from scalevit.planning.activations import MODES
from scalevit.planning.devices import load_device
from scalevit.planning.estimate import RunEstimate, estimate_run

_SMALL = [
    "model.name=vit_tiny_patch16_224",
    'model.kwargs={"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}',
    "model.image_size=16",
    "model.num_classes=10",
    "train.global_batch=64",
    "train.micro_batch=16",
]


def config(*overrides: str) -> Config:
    return load_config(None, [*_SMALL, *overrides])


def run(*overrides: str, **arguments: Any) -> RunEstimate:
    arguments = {"gpus": 2, "nodes": 1, "optimizer_tensors": 2, "optimizer_refusals": {}} | arguments
    return estimate_run(config(*overrides), load_device("h100"), **arguments)


def test_every_reduction_and_engine_has_a_row() -> None:
    rows = [(row.strategy, row.engine) for row in run().rows]
    engines = [variant.label for part in ENGINES for variant in part().variants()]
    assert rows == [(part.kind(), engine) for part in REDUCTIONS for engine in engines]


def test_the_configs_own_row_alone() -> None:
    own = [row for row in run().rows if (row.strategy, row.engine) == ("none", "ZeRO 1")]
    alone = run(compare=False)
    assert alone.rows == own
    assert alone.activations == {}


def test_the_activations_of_the_configs_own_row_are_in_the_table() -> None:
    found = run("train.micro_batch=auto", "kernels.save=lean")
    own = next(row for row in found.rows if (row.strategy, row.engine) == ("none", "ZeRO 1"))
    assert found.activations_of == own.micro_batch
    assert list(found.activations) == [*((mode, False) for mode in MODES), ("lean", True)]
    assert found.activations["lean", False].peak_bytes == own.activation_bytes


class OtherEngine(FsdpSettings):
    """An engine that the planner has no line for."""

    @property
    def label(self) -> str:
        return "other"


class OtherReduction(GroupedReduction):
    """A reduction that the planner has no line for."""

    strategy: Literal["other"] = "other"  # type: ignore[assignment]


def test_a_new_engine_and_a_new_reduction_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "ENGINES", (OtherEngine,))
    monkeypatch.setattr(estimate, "REDUCTIONS", (*REDUCTIONS[:1], OtherReduction))
    rows = run().rows
    assert [(row.strategy, row.engine) for row in rows] == [(REDUCTIONS[0].kind(), "other"), ("other", "other")]
    assert rows[1].parameters < rows[0].parameters


@pytest.fixture
def one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines only are compared, which takes less time."""
    monkeypatch.setattr(estimate, "REDUCTIONS", REDUCTIONS[:1])


@pytest.mark.usefixtures("one_reduction")
def test_the_optimizer_state_follows_its_number_of_tensors() -> None:
    one, two = (run(optimizer_tensors=count).rows for count in (1, 2))
    for fewer, more in zip(one, two, strict=True):
        difference = more.cost.memory.optimizer - fewer.cost.memory.optimizer
        assert difference == more.cost.updated_bytes > 0, more.engine
        assert more.seconds["memory"] > fewer.seconds["memory"]


def test_a_reduction_that_the_model_does_not_allow_is_left_out_with_the_reason() -> None:
    odd = 'model.kwargs={"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}'
    estimate = run(odd)
    assert list(estimate.left_out) == ["grouped"]
    assert "3 blocks" in estimate.left_out["grouped"]
    assert {row.strategy for row in estimate.rows} == {part.kind() for part in REDUCTIONS} - {"grouped"}


@pytest.mark.usefixtures("one_reduction")
def test_engines_that_cannot_run_the_optimizer_have_no_row() -> None:
    refusals = {"elements": "needs norms"}
    estimate = run("engine.name=fsdp", optimizer_refusals=refusals)
    engines = {variant.label for part in ENGINES for variant in part().variants()}
    assert {"ZeRO 0", "FSDP2"} <= {row.engine for row in estimate.rows} == engines - estimate.engines_left_out.keys()
    assert {f"ZeRO {stage}": "needs norms" for stage in (1, 2, 3)}.items() <= estimate.engines_left_out.items()
    # FSDP2's scope depends on the ranks: with one shard it is as wide as that of one process.
    refusals["tensors"] = "needs matrices"
    assert run("engine.stage=0", optimizer_refusals=refusals).engines_left_out["FSDP2"] == "needs matrices"
    assert "FSDP2" in {row.engine for row in run("engine.name=fsdp", optimizer_refusals=refusals, gpus=1).rows}


def test_the_configs_own_engine_must_run_the_optimizer() -> None:
    with pytest.raises(SettingError, match=r"^optimizer = \"adamw\": needs norms$"):
        run("engine.stage=1", optimizer_refusals={"elements": "needs norms"})


def test_settings_without_an_estimate_are_named_by_their_config_keys() -> None:
    assert run(compare=False).not_estimated == []
    settings = ["engine.name=fsdp", "engine.cpu_offload=true", "engine.mixed_precision=policy", "train.compile=true"]
    settings += ["task.name=nested_width"]
    assert run(*settings, compare=False).not_estimated == [
        "engine.cpu_offload",
        "engine.mixed_precision",
        "task.widths",
        "train.compile",
    ]
