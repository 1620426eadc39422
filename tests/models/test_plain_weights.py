"""State dicts of other programs: sets of weights, wrappers, and reduced models recognised by their tensors."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.api import load_weights
from scalevit.models.build import build_model
from scalevit.models.meta_init import initial_values
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.read import read_weights
from scalevit.models.weights.write import write_weights

MODEL = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, num_classes=7, kwargs={"embed_dim": 48, "depth": 4, "num_heads": 3}
)
REDUCTIONS = [NoReduction(), GroupedReduction(), ShallowReduction(), ThinReduction()]
State = dict[str, Tensor]


def state_of(reduction: Reduction, seed: int = 5) -> State:
    return build_model(MODEL, reduction, seed=seed).state_dict()


def saved(content: Any, folder: Path, name: str = "other.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def loaded(path: Path, reduction: Reduction, **changes: Any) -> tuple[State, Coverage]:
    found: list[Coverage] = []
    model = MODEL.model_copy(update={"initial_weights": str(path), **changes})
    state = build_model(model, reduction, seed=99, on_weights=found.append).state_dict()
    return state, found[0]


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def refused(path: Path, reduction: Reduction, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        loaded(path, reduction, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- sets of weights and wrappers -----------------------------------------------------------------------------


def checkpoint(**sets: State) -> dict[str, Any]:
    """What timm's train.py saves."""
    arguments = argparse.Namespace(model=MODEL.name, lr=1e-3, img_size=None, mean=[0.5], aa="rand-m9")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]}
    return {"epoch": 3, "arch": MODEL.name, "optimizer": optimizer, "version": 2, "args": arguments, **sets}


@pytest.mark.parametrize(
    ("keys", "wanted", "expected", "said"),
    [
        (("state_dict", "state_dict_ema"), "auto", 1, "ema"),
        (("state_dict", "state_dict_ema"), "ema", 1, "ema"),
        (("state_dict", "state_dict_ema"), "weights", 0, "weights"),
        (("model", "model_ema"), "auto", 1, "ema"),
        (("state_dict",), "auto", 0, None),
        (("model",), "weights", 0, None),
    ],
)
def test_a_checkpoint_of_timm_gives_its_ema_or_the_chosen_set(
    keys: tuple[str, ...], wanted: str, expected: int, said: str | None, tmp_path: Path
) -> None:
    sets = [state_of(NoReduction(), seed=seed) for seed in (5, 6)]
    path = saved(checkpoint(**dict(zip(keys, sets, strict=False))), tmp_path, "model_best.pth.tar")
    state, coverage = loaded(path, NoReduction(), initial_weights_set=wanted)
    assert_equal(state, sets[expected])
    assert coverage.weights_set == said
    of = {"ema": " of its EMA", "weights": " of its weights without EMA", None: ""}[said]
    assert str(coverage) == f"all {len(state)} tensors{of}"


def test_a_set_that_a_file_does_not_have_is_one_line(tmp_path: Path) -> None:
    state = state_of(NoReduction())
    path = saved(checkpoint(state_dict=state), tmp_path, "last.pth.tar")
    assert "the file has only weights" in refused(path, NoReduction(), initial_weights_set="ema")
    path = saved(checkpoint(state_dict_ema=state), tmp_path, "ema.pth.tar")
    assert "the file has only ema" in refused(path, NoReduction(), initial_weights_set="weights")
    path = tmp_path / "plain.safetensors"
    save_file(state, path)
    assert "one set of weights" in refused(path, NoReduction(), initial_weights_set="weights")


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module._orig_mod.module.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_prefixes_of_wrappers_are_removed(wrapped: str, tmp_path: Path) -> None:
    state = state_of(NoReduction())
    renamed = {wrapped.format(name): tensor for name, tensor in state.items()}
    # Compiled or recomputed block by block too.
    renamed = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in renamed.items()}
    assert_equal(loaded(saved({"state_dict": renamed}, tmp_path), NoReduction())[0], state)


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path: Path) -> None:
    state = state_of(NoReduction())
    both = {**state, "module.norm.weight": state["norm.weight"] + 1}
    assert "has two tensors norm.weight" in refused(saved(both, tmp_path), NoReduction())


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.makedirs, (str(self._path), 0o755, True)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    arguments = argparse.Namespace(hook=Payload(target))
    path = tmp_path / "malicious.pth.tar"
    content = {"state_dict": state_of(NoReduction()), "args": arguments, "hook": Payload(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused(path, NoReduction())
    assert "contains more than tensors" in message
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the payload works where it is executed"


@pytest.mark.parametrize("form", ["zip", "pickle", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_file_without_its_end_is_one_line(form: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"weights{'.safetensors' if form == 'safetensors' else '.pth'}"
    state = {"a": torch.zeros(50_000), "b": torch.zeros(3)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(error.value) == f"weights {path}: is cut or empty: copy or download it again"


@pytest.mark.parametrize(("name", "form"), [("x.onnx", "onnx"), ("x.pt2", "torch")])
def test_a_program_is_no_file_of_weights(name: str, form: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"program")
    expected = f"weights {tmp_path / name}: is an export (--to {form}): name the run or its weights"
    assert refused(tmp_path / name, NoReduction()) == expected


@pytest.mark.filterwarnings("error")
def test_a_plain_pickle_is_one_line(tmp_path: Path) -> None:
    """torch warns of a pickle that it has not written, in two more lines."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    assert "it is damaged, or contains more than tensors" in refused(tmp_path / "a.pkl", NoReduction())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_values_that_are_no_numbers_are_refused(value: float, suffix: str, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in state_of(NoReduction()).items()}
    state["blocks.2.norm1.weight"][3] = value
    path = tmp_path / f"diverged{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    assert refused(path, NoReduction()).startswith(f"weights {path}: blocks.2.norm1.weight has NaN or infinite values")


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool"])
@pytest.mark.parametrize("name", ["blocks.2.mlp.fc1.weight", "pos_embed"])
def test_integer_weights_are_refused(name: str, dtype: str, tmp_path: Path) -> None:
    state = state_of(NoReduction())
    path = saved({**state, name: (100 * state[name]).to(getattr(torch, dtype))}, tmp_path)
    expected = f"weights {path}: {name} has dtype {dtype}, the model's is float32: save floating-point weights"
    assert refused(path, NoReduction()) == expected
    with pytest.raises(UserError) as error:
        load_weights(build_model(MODEL, NoReduction(), seed=1), path)
    assert str(error.value) == expected


def test_weights_in_half_precision_are_loaded(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in state_of(NoReduction()).items()}
    assert_equal(loaded(saved(state, tmp_path), NoReduction())[0], {name: t.float() for name, t in state.items()})


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"state_dict": None, "epoch": 3},
        [torch.zeros(1)],
        {"weights": [1, 2]},
    ],
    ids=["empty", "none", "list", "numbers"],
)
def test_what_is_no_state_dict_is_one_line(content: Any, tmp_path: Path) -> None:
    assert "holds no state dict" in refused(saved(content, tmp_path), NoReduction())


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda part: part.strategy)
def test_half_a_state_dict_is_refused(reduction: Reduction, tmp_path: Path) -> None:
    state = state_of(reduction)
    half = {name: state[name] for name in list(state)[: len(state) // 2]}
    assert ": lacks " in refused(saved(half, tmp_path), reduction)


# --- reduced models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda part: part.strategy)
def test_a_plain_state_dict_of_a_reduced_model_is_loaded_as_it_is(reduction: Reduction, tmp_path: Path) -> None:
    state = state_of(reduction)
    path = saved(checkpoint(state_dict_ema=state), tmp_path)
    found, coverage = loaded(path, reduction)
    assert_equal(found, state)
    assert coverage.already_reduced == reduction.changes_model
    assert coverage.separated == ()
    model = MODEL.model_copy(update={"initial_weights": str(path)})
    for name, tensor in initial_values(model, reduction, seed=1):
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("form", ["save_model", "without the further names"])
def test_shared_tensors_may_be_listed_once(form: str, tmp_path: Path) -> None:
    model = build_model(MODEL, GroupedReduction(), seed=5)
    path = tmp_path / "once.safetensors"
    if form == "save_model":
        save_model(model, str(path))
    else:
        save_file(dict(model.named_parameters()), path)
    state, coverage = loaded(path, GroupedReduction())
    assert_equal(state, model.state_dict())
    assert coverage.already_reduced


@pytest.mark.parametrize("reduction", [GroupedReduction(), ShallowReduction()], ids=lambda part: part.strategy)
def test_an_unreduced_state_dict_is_reduced_after_loading(reduction: Reduction, tmp_path: Path) -> None:
    state, coverage = loaded(saved(state_of(NoReduction()), tmp_path), reduction)
    assert_equal(state, state_of(reduction))  # which is the baseline of this seed, reduced
    assert not coverage.already_reduced


@pytest.mark.parametrize(
    ("made_with", "wanted", "named"),
    [
        (GroupedReduction(), ShallowReduction(), '{"strategy": "grouped", "group_size": 2}'),
        (GroupedReduction(), GroupedReduction(group_size=4), '{"strategy": "grouped", "group_size": 2}'),
        (GroupedReduction(group_size=4), GroupedReduction(), '{"strategy": "grouped", "group_size": 4}'),
        (GroupedReduction(groups=[[1, 2]]), GroupedReduction(), '{"strategy": "grouped", "groups": [[1, 2]]}'),
        (ShallowReduction(), GroupedReduction(), '{"strategy": "shallow"'),
        (ShallowReduction(keep=0.25), ShallowReduction(), '{"strategy": "shallow", "keep": 0.25}'),
        (ShallowReduction(), NoReduction(), '{"strategy": "shallow"} or {"strategy": "thin"}'),
        (ThinReduction(mlp_ratio=1.0), NoReduction(), '{"strategy": "thin", "mlp_ratio": 1.0}'),
        (ThinReduction(), GroupedReduction(), '{"strategy": "shallow"} or {"strategy": "thin"}'),
        (ThinReduction(), ShallowReduction(keep=0.25), '{"strategy": "shallow"} or {"strategy": "thin"}'),
        (GroupedReduction(), ThinReduction(), '{"strategy": "grouped", "group_size": 2}'),
        (GroupedReduction(keep=0.5), ThinReduction(), '{"strategy": "grouped", "group_size": 2, "keep": 0.5}'),
        (ShallowReduction(keep=0.75), ThinReduction(), '{"strategy": "shallow", "keep": 0.75} or {"strategy": "thin"'),
        (ShallowReduction(keep=0.25), ThinReduction(), '{"strategy": "shallow", "keep": 0.25} or {"strategy": "thin"'),
        (ThinReduction(), ThinReduction(mlp_ratio=1.0), '{"strategy": "shallow"} or {"strategy": "thin"}'),
    ],
)
def test_weights_of_another_structure_are_refused_with_its_name(
    made_with: Reduction, wanted: Reduction, named: str, tmp_path: Path
) -> None:
    message = refused(saved(state_of(made_with), tmp_path), wanted)
    file, _, config = message.partition(", which has another structure than ")
    assert "made with reduction " in file
    assert named in file
    assert json.dumps(wanted.strategy) in config


def test_blocks_that_shared_an_mlp_get_a_copy_each_in_a_model_without_reduction(tmp_path: Path) -> None:
    state = state_of(GroupedReduction())
    found, coverage = loaded(saved(state, tmp_path), NoReduction())
    assert_equal(found, state)
    assert coverage.separated == ((0, 1), (2, 3))
    assert str(coverage).endswith("; blocks 0, 1, blocks 2, 3 shared an MLP, each has a copy now")


def test_unreduced_weights_do_not_fit_a_thin_model(tmp_path: Path) -> None:
    """For a file of ours and another program's: the message names the command that makes such weights."""
    path = saved(state_of(NoReduction()), tmp_path)
    command = "`scalevit reduce {} --to NEW.safetensors reduction.strategy=thin reduction.mlp_ratio=1.5`"
    assert refused(path, ThinReduction(mlp_ratio=1.5)).endswith(f"make its weights with {command.format(path)}")
    ours = tmp_path / "ours.safetensors"
    write_weights(ours, state_of(NoReduction()), model=MODEL, reduction=NoReduction(), tied={})
    assert refused(ours, ThinReduction(mlp_ratio=1.5)).endswith(f"make its weights with {command.format(ours)}")
    # Weights of another model are not made so.
    kwargs = {**MODEL.kwargs, "depth": 2}
    assert "which this model lacks; weights are of" in refused(ours, ThinReduction(), kwargs=kwargs)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda part: part.strategy)
def test_plain_reduced_weights_are_fine_tuned_in_other_sizes(reduction: Reduction, tmp_path: Path) -> None:
    state = state_of(reduction)
    kwargs = {**MODEL.kwargs, "patch_size": 8}
    found, coverage = loaded(saved(state, tmp_path), reduction, image_size=48, kwargs=kwargs, num_classes=3)
    assert found["patch_embed.proj.weight"].shape == (48, 3, 8, 8)
    assert found["pos_embed"].shape == (1, 37, 48)
    assert found["head.weight"].shape == (3, 48)
    assert coverage.resampled == ("pos_embed", "patch_embed.proj.weight")
    assert coverage.fresh == ("head.bias", "head.weight")
    other = {"pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias"}
    assert_equal({n: t for n, t in found.items() if n not in other}, {n: t for n, t in state.items() if n not in other})


def test_what_a_file_has_more_is_said(tmp_path: Path) -> None:
    """As DINOv2's mask token, which timm drops."""
    path = saved({**state_of(NoReduction()), "mask_token": torch.zeros(1, 48)}, tmp_path)
    coverage = loaded(path, NoReduction())[1]
    assert coverage.unused == ("mask_token",)
    assert str(coverage).endswith("; mask_token of the file not used")
    assert read_weights(path).tensors["mask_token"].shape == (1, 48)
