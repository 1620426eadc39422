"""Drop-path and dropout from keys of rows: rates, independence of everything but the row, and every kind of layer."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath, PatchDropout
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.models.build import build_model
from scalevit.models.dropout import RowDropout, RowDropPath, RowKeys, RowPatchDropout, use_row_keys
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.randomness import Purpose, row_keys, uniforms

CPU = torch.device("cpu")
DRAWS = 100_000
RATES = {"attn_drop_rate": 0.1, "proj_drop_rate": 0.2, "pos_drop_rate": 0.1, "drop_rate": 0.1, "patch_drop_rate": 0.25}


def keys(rows, step=0):
    return row_keys(5, Purpose.DROPPING, step, np.asarray(rows))


def model(mlp="eager", **more):
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=16,
        num_classes=5,
        drop_path=0.3,
        kwargs={"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, **more},
    )
    network = build_model(config, GroupedReduction(), seed=0, kernels=KernelsConfig(mlp=mlp))
    use_row_keys(network)
    return network.train()


def images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def forward(network, rows, step=0):
    RowKeys(network).set(5, step, np.asarray(rows), CPU)
    return network(images(12)[np.asarray(rows)])


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_drop_path_rates_are_timms(rate):
    ours, theirs = RowDropPath(DropPath(rate)), DropPath(rate)
    ours.set_keys(keys(range(DRAWS)), CPU)
    torch.manual_seed(0)
    ones = torch.ones(DRAWS, 2)
    own, expected = ours(ones), theirs(ones)
    assert set(own.unique().tolist()) == set(expected.unique().tolist())
    deviation = (2 * rate * (1 - rate) / DRAWS) ** 0.5  # of the difference of two shares
    assert abs((own[:, 0] == 0).double().mean() - (expected[:, 0] == 0).double().mean()) < 5 * deviation


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deit3_small_patch16_224", {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 4}),
        ("vit_base_patch16_dinov3", {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 4}),
        ("swin_tiny_patch4_window7_224", {"depths": [2, 2], "embed_dim": 32, "num_heads": [2, 2], "window_size": 2}),
    ],
)
def test_drop_path_grows_or_is_the_same_in_every_block(name, sizes):
    def rates(mode):
        config = ModelConfig(name=name, image_size=32, num_classes=5, drop_path=0.3, drop_path_mode=mode, kwargs=sizes)
        network = build_model(config, NoReduction(), seed=0)
        branches = [layer for key, layer in network.named_modules() if key.rpartition(".")[2].startswith("drop_path")]
        return [getattr(layer, "drop_prob", 0.0) for layer in branches], network.state_dict()

    grown, constant = rates("linear"), rates("constant")
    assert grown[0] == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert constant[0] == [0.3] * 8
    for key, value in grown[1].items():
        assert torch.equal(value, constant[1][key]), key


def test_draws_are_uniform_and_independent():
    drawn = uniforms(keys(range(DRAWS)), 3)
    assert abs(drawn.mean(0) - 0.5).max() < 5 / (12 * DRAWS) ** 0.5
    assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 5 / DRAWS**0.5
    for other in (
        keys(range(DRAWS), step=1),
        row_keys(5, Purpose.ERASING, 0, np.arange(DRAWS)),
        keys(range(1, DRAWS + 1)),
    ):
        assert abs(np.corrcoef(drawn[:, 0], uniforms(other, 1)[:, 0])[0, 1]) < 5 / DRAWS**0.5


def test_dropout_keeps_its_share_and_scale():
    layer = RowDropout(nn.Dropout(0.2))
    layer.set_keys(keys(range(50)), CPU)
    dropped = layer(torch.ones(50, 40, 50))
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    deviation = (0.2 * 0.8 / DRAWS) ** 0.5
    assert abs((dropped == 0).double().mean() - 0.2) < 5 * deviation
    # Neither rows nor elements have a mask in common.
    masks = (dropped == 0).flatten(1).double().numpy()
    assert abs(np.corrcoef(masks) - np.eye(50)).max() < 6 / masks.shape[1] ** 0.5
    assert abs(np.corrcoef(masks[:, :-1].ravel(), masks[:, 1:].ravel())[0, 1]) < 5 / DRAWS**0.5


@pytest.mark.parametrize("ordered", [False, True])
def test_patch_dropout_keeps_prefix_and_share(ordered):
    layer = RowPatchDropout(PatchDropout(0.25, num_prefix_tokens=1, ordered=ordered))
    tokens = torch.arange(17.0).view(1, 17, 1).expand(2000, 17, 1)
    layer.set_keys(keys(range(2000)), CPU)
    kept = layer(tokens)[:, :, 0]
    assert kept.shape == (2000, 13)
    assert (kept[:, 0] == 0).all()
    assert all(len(set(row)) == 13 for row in kept.tolist())
    if ordered:
        assert (kept.diff(dim=1) > 0).all()
    counts = np.bincount(kept[:, 1:].long().flatten().numpy(), minlength=17)[1:]
    assert abs(counts / 2000 - 0.75).max() < 5 * (0.75 * 0.25 / 2000) ** 0.5


@pytest.mark.parametrize("more", [{}, RATES], ids=["drop-path", "every kind"])
def test_a_row_does_not_depend_on_those_it_is_computed_with(more):
    network = model(**more)
    whole = forward(network, range(12))
    assert not torch.equal(whole, forward(network, range(12), step=1))
    for size in (1, 3, 5):
        parts = [forward(network, range(start, min(start + size, 12))) for start in range(0, 12, size)]
        # Other sizes of products are summed in another order.
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_compiled_and_recomputed_blocks_use_the_same_masks():
    expected = forward(model(**RATES), range(8))
    recomputed, compiled = model(**RATES), model(**RATES)
    for block in recomputed.blocks:
        block.forward = lambda x, own=block.forward: checkpoint(own, x, use_reentrant=False)
    for block in compiled.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    plain = model(**RATES)
    for step in range(3):
        outputs = [forward(network, range(8), step) for network in (plain, recomputed, compiled)]
        gradients = []
        for network, output in zip((plain, recomputed, compiled), outputs, strict=True):
            network.zero_grad()
            output.square().sum().backward()
            gradients.append([p.grad for p in network.parameters()])
        for output, others in zip(outputs[1:], gradients[1:], strict=True):
            torch.testing.assert_close(output, outputs[0])
            torch.testing.assert_close(others, gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(forward(plain, range(8)), expected)


def test_new_masks_compile_nothing_anew():
    network = model()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in network.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    forward(network, range(8))
    first = len(graphs)
    for step in range(1, 4):
        forward(network, range(8), step)
    assert len(graphs) == first


def test_blocks_that_share_an_mlp_have_masks_of_their_own():
    network = model(proj_drop_rate=0.2)
    one, other = network.blocks[0].mlp, network.blocks[1].mlp
    assert one.fc1 is other.fc1
    assert one.drop2 is not other.drop2
    names = [name for name, _ in network.named_parameters()]
    assert "blocks.1.mlp.fc1.weight" not in names


def test_every_layer_of_timms_models_is_replaced():
    """Nothing else in a model draws numbers in training."""
    for name in ("vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch14_dinov2"):
        rates = dict.fromkeys(("drop_path_rate", "attn_drop_rate", "proj_drop_rate", "drop_rate"), 0.1)
        sizes = {"img_size": 28 if "14" in name else 32, "depth": 2, "embed_dim": 64, "num_heads": 2}
        network = timm.create_model(name, **sizes, **rates)
        use_row_keys(network)
        network.train()
        RowKeys(network).set(5, 0, np.arange(2), CPU)
        state = torch.get_rng_state()
        network(torch.rand(2, 3, *network.patch_embed.img_size, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), state), name


def test_in_evaluation_nothing_is_dropped():
    network = model(**RATES).eval()
    with torch.no_grad():
        assert torch.equal(network(images(2)), network(images(2)))
