"""Original checkpoints of Google (`.npz`) and Facebook (DINOv2, DINOv3), generated here in their layout of names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.meta_init import initial_values
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.weights.coverage import Coverage

Arrays = dict[str, np.ndarray]
SIZES: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def source_model(name: str, image_size: int, num_classes: int = 7, **changes: Any) -> nn.Module:
    """Every parameter of it is random, also those that timm begins with zeros or ones."""
    torch.manual_seed(3)
    model = timm.create_model(name, img_size=image_size, num_classes=num_classes, **{**SIZES, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def loaded(
    path: Path, name: str, image_size: int, reduction: Reduction | None = None, **changes: Any
) -> tuple[nn.Module, Coverage]:
    found: list[Coverage] = []
    config = {"num_classes": 7, "kwargs": SIZES, **changes}
    model = ModelConfig(name=name, image_size=image_size, drop_path=0.0, initial_weights=str(path), **config)
    network = build_model(model, reduction or NoReduction(), seed=9, on_weights=found.append)
    return network.eval(), found[0]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    different = [n for n, tensor in one.state_dict().items() if not torch.equal(tensor, other.state_dict()[n])]
    assert different == []


# --- Google -------------------------------------------------------------------------------------------------------


def dense(weight: Tensor, *shape: int) -> np.ndarray:
    """A layer's weight (out, in) as JAX's kernel (in, out), with heads apart where there is a shape."""
    kernel = weight.detach().numpy().T
    return kernel.reshape(shape) if shape else kernel


def attention_arrays(layer: Any, heads: int, names: tuple[str, ...]) -> Arrays:
    """Of a layer that computes these, e.g. query, key and value, packed in one weight."""
    width = layer.weight.shape[1]
    weights, biases = layer.weight.chunk(len(names)), layer.bias.chunk(len(names))
    kernels = {f"{n}/kernel": dense(w, width, heads, width // heads) for n, w in zip(names, weights, strict=True)}
    return kernels | {
        f"{n}/bias": b.detach().numpy().reshape(heads, width // heads) for n, b in zip(names, biases, strict=True)
    }


def layer_arrays(name: str, layer: Any) -> Arrays:
    kind = "scale" if layer.weight.ndim == 1 else "kernel"
    value = layer.weight.detach().numpy() if kind == "scale" else dense(layer.weight)
    return {f"{name}/{kind}": value, f"{name}/bias": layer.bias.detach().numpy()}


def block_arrays(block: Any, *, attention: int, mlp: int, norm: int, heads: int = 3) -> Arrays:
    width = block.attn.proj.weight.shape[0]
    own = f"MultiHeadDotProductAttention_{attention}"
    arrays = layer_arrays("LayerNorm_0", block.norm1) | layer_arrays(f"LayerNorm_{norm}", block.norm2)
    qkv = attention_arrays(block.attn.qkv, heads, ("query", "key", "value"))
    arrays |= {f"{own}/{name}": array for name, array in qkv.items()}
    arrays[f"{own}/out/kernel"] = dense(block.attn.proj.weight, heads, width // heads, width)
    arrays[f"{own}/out/bias"] = block.attn.proj.bias.detach().numpy()
    for index, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
        arrays |= layer_arrays(f"MlpBlock_{mlp}/Dense_{index}", layer)
    return arrays


def stem_arrays(model: Any) -> Arrays:
    kernel = model.patch_embed.proj.weight.detach().numpy().transpose(2, 3, 1, 0)
    arrays = {"embedding/kernel": kernel, "embedding/bias": model.patch_embed.proj.bias.detach().numpy()}
    return arrays | layer_arrays("Transformer/encoder_norm", model.norm)


def augreg(model: Any) -> Arrays:
    """As AugReg's and ViT's archives: blocks with numbers."""
    arrays = stem_arrays(model) | layer_arrays("head", model.head)
    arrays["cls"] = model.cls_token.detach().numpy()
    arrays["Transformer/posembed_input/pos_embedding"] = model.pos_embed.detach().numpy()
    for index, block in enumerate(model.blocks):
        own = block_arrays(block, attention=1, mlp=3, norm=2)
        arrays |= {f"Transformer/encoderblock_{index}/{name}": array for name, array in own.items()}
    return arrays


def big_vision(model: Any) -> Arrays:
    """As SigLIP's archives: all blocks in one array, and attention pooling."""
    arrays = stem_arrays(model) | {"pos_embedding": model.pos_embed.detach().numpy()}
    blocks = [block_arrays(block, attention=0, mlp=0, norm=1) for block in model.blocks]
    arrays |= {f"Transformer/encoderblock/{name}": np.stack([own[name] for own in blocks]) for name in blocks[0]}
    pool, width = model.attn_pool, model.embed_dim
    heads = pool.num_heads
    own = attention_arrays(pool.kv, heads, ("key", "value")) | attention_arrays(pool.q, heads, ("query",))
    own["out/kernel"] = dense(pool.proj.weight, heads, width // heads, width)
    own["out/bias"] = pool.proj.bias.detach().numpy()
    head = {f"MultiHeadDotProductAttention_0/{name}": array for name, array in own.items()}
    head |= layer_arrays("LayerNorm_0", pool.norm) | {"probe": pool.latent.detach().numpy()}
    for index, layer in enumerate((pool.mlp.fc1, pool.mlp.fc2)):
        head |= layer_arrays(f"MlpBlock_0/Dense_{index}", layer)
    arrays |= {f"MAPHead_0/{name}": array for name, array in head.items()}
    return {f"params/img/{name}": array for name, array in arrays.items()}


AUGREG, SIGLIP = "vit_tiny_patch16_224", "vit_base_patch16_siglip_224"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "augreg.npz", **augreg(source_model(AUGREG, 32)))
    return tmp_path / "augreg.npz"


def test_an_archive_of_augreg(archive: Path) -> None:
    network, coverage = loaded(archive, AUGREG, 32)
    assert_same(network, source_model(AUGREG, 32))
    assert str(coverage) == f"all {len(network.state_dict())} tensors"
    network, coverage = loaded(archive, AUGREG, 32, num_classes=3)
    assert coverage.fresh == ("head.bias", "head.weight")
    reduced, coverage = loaded(archive, AUGREG, 32, GroupedReduction())
    assert not coverage.already_reduced
    expected = source_model(AUGREG, 32).blocks[0].mlp.fc1.weight * 2**-0.5
    torch.testing.assert_close(reduced.blocks[1].mlp.fc1.weight, expected)


def test_an_archive_in_other_sizes_is_read_as_timm_does(archive: Path) -> None:
    network, coverage = loaded(archive, AUGREG, 48, kwargs={**SIZES, "patch_size": 8})
    theirs = timm.create_model(AUGREG, img_size=48, num_classes=7, patch_size=8, **SIZES)
    theirs.load_pretrained(str(archive))
    assert_same(network, theirs)
    assert coverage.fresh == ()


def test_an_archive_is_read_leaf_by_leaf_too(archive: Path) -> None:
    model = ModelConfig(name=AUGREG, image_size=32, num_classes=7, initial_weights=str(archive), kwargs=SIZES)
    expected = dict(build_model(model, GroupedReduction(), seed=1).named_parameters())
    for name, tensor in initial_values(model, GroupedReduction(), seed=1):
        assert torch.equal(tensor, expected[name]), name


def test_an_archive_of_siglip(tmp_path: Path) -> None:
    source = source_model(SIGLIP, 32, num_classes=0)
    np.savez(tmp_path / "siglip.npz", **big_vision(source))
    network, coverage = loaded(tmp_path / "siglip.npz", SIGLIP, 32)
    assert coverage.fresh == ("head.bias", "head.weight")
    network.reset_classifier(0)
    assert_same(network, source)


class Payload:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.makedirs, (str(self._path), 0o755, True)


def test_mistakes_with_archives_are_one_line(archive: Path, tmp_path: Path) -> None:
    arrays = augreg(source_model(AUGREG, 32))
    half = {name: array for name, array in arrays.items() if "encoderblock_1/Mlp" not in name}
    spoiled = {**arrays, "cls": np.full_like(arrays["cls"], np.nan)}
    pickled = {**arrays, "cls": np.array([Payload(tmp_path / "executed")], dtype=object)}
    for name, content in (("half", half), ("spoiled", spoiled), ("pickled", pickled), ("other", {"a": np.zeros(2)})):
        np.savez(tmp_path / f"{name}.npz", **content)
    (tmp_path / "damaged.npz").write_bytes(archive.read_bytes()[:5000])
    (tmp_path / "text.npz").write_bytes(b"<html>")
    for name, changes, part in (
        ("half", {}, "timm cannot read it for this model (KeyError"),
        ("spoiled", {}, "lacks cls_token"),
        ("pickled", {}, "timm cannot read it for this model (ValueError: Object arrays cannot be loaded"),
        ("other", {}, "has 0 blocks, and this model 2"),
        ("damaged", {}, "is cut or empty"),
        ("text", {}, "cannot be read ("),
        ("augreg", {"kwargs": {**SIZES, "depth": 1}}, "has 2 blocks, and this model 1"),
        ("augreg", {"kwargs": {**SIZES, "embed_dim": 96}}, "timm cannot read it for this model (RuntimeError"),
    ):
        with pytest.raises(UserError) as error:
            loaded(tmp_path / f"{name}.npz", AUGREG, 32, **changes)
        assert part in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


# --- Facebook -----------------------------------------------------------------------------------------------------

DINOV2, REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"


@pytest.mark.parametrize("name", [DINOV2, REGISTERS])
def test_original_weights_of_dinov2(name: str, tmp_path: Path) -> None:
    source = source_model(name, 28, num_classes=0)
    state = {**source.state_dict(), "mask_token": torch.randn(1, 48)}
    if name == REGISTERS:
        # Facebook's class token has a position of its own, which timm adds to it.
        state["register_tokens"] = state.pop("reg_token")
        place = torch.randn(1, 1, 48)
        state["cls_token"] = state["cls_token"] - place
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    network, coverage = loaded(tmp_path / "dinov2.pth", name, 28)
    assert coverage.fresh == ("head.bias", "head.weight")
    assert coverage.unused == ("mask_token",)
    network.reset_classifier(0)
    for key, tensor in source.state_dict().items():  # rounded where a position was subtracted and added
        torch.testing.assert_close(network.state_dict()[key], tensor, atol=1e-6, rtol=0)
    network, coverage = loaded(tmp_path / "dinov2.pth", name, 42, GroupedReduction())
    assert "pos_embed" in coverage.resampled
    assert network.blocks[1].mlp is network.blocks[0].mlp


# Facebook's name -> timm's, within a block.
_DINOV3 = {
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}


def dinov3(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a timm model in Facebook's layout: all biases of the attention in one, and a mask for it."""
    gated = "blocks.0.mlp.fc1_g.weight" in model.state_dict()
    names = {timms: theirs for theirs, timms in _DINOV3.items() if gated or "mlp" not in timms}
    result = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    for name, tensor in model.state_dict().items():
        for timms, theirs in {**names, "reg_token": "storage_tokens"}.items():
            name = name.replace(timms, theirs)
        result[name] = tensor
    for block in range(SIZES["depth"]):
        own = f"blocks.{block}.attn"
        zeros = torch.zeros(48)
        biases = result.pop(f"{own}.q_bias", zeros), zeros, result.pop(f"{own}.v_bias", zeros)
        result[f"{own}.qkv.bias"] = torch.cat(biases)
        result[f"{own}.qkv.bias_mask"] = torch.cat([zeros + 1, zeros, zeros + 1])
    return result


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"]
)
def test_original_weights_of_dinov3(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = source_model(name, 32, num_classes=0)
    torch.save(dinov3(source), tmp_path / "dinov3.pth")
    network, coverage = loaded(tmp_path / "dinov3.pth", name, 32)
    assert coverage.fresh == ("head.bias", "head.weight")
    assert {"mask_token", "rope_embed.periods"} <= set(coverage.unused)
    network.reset_classifier(0)
    assert_same(network, source)
    assert capfd.readouterr().out == "", "timm prints what a model without biases lacks"
    network, coverage = loaded(tmp_path / "dinov3.pth", name, 48, GroupedReduction())
    assert not coverage.already_reduced
    assert network.blocks[1].mlp is network.blocks[0].mlp
