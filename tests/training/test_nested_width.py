"""Width-nested training: gradients of explicit narrow models, draws, evaluation at every width, cuts, and resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_runs import ALONE, config, evaluate, gradients, micro_batch, spread, train, write
from timm.layers import Mlp
from torch import Tensor, nn

from launching import metrics
from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.engines.base import compile_blocks
from scalevit.errors import SettingError, UserError
from scalevit.export.checkpoint_model import model_of_checkpoint
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.nested import NestedWidths, cut_to_width, units_of
from scalevit.training.run import prepare
from scalevit.training.tasks.divergence import softened_divergence
from scalevit.training.tasks.nested_width import NestedWidthRunner

NESTED = ["task.name=nested_width", "task.widths=[0.25,0.5,0.75,1.0]", "task.random_widths=1"]


def nested_model(of: Config) -> tuple[nn.Module, NestedWidthRunner]:
    model = spread(build_model(of.model, of.reduction, seed=1, kernels=of.kernels))
    of.task.adapt(model, of.kernels)
    runner = of.task.build(of, ALONE)
    assert isinstance(runner, NestedWidthRunner)
    runner.extend(model)
    runner.start(model)
    return model.train(), runner


def narrow_model(of: Config, width: float) -> nn.Module:
    """timm's own modules with the first units only, cut by hand."""
    model = spread(build_model(of.model, of.reduction, seed=1)).train()
    for mlp in [module for module in model.modules() if isinstance(module, Mlp)]:
        units = units_of(width, mlp.fc1.out_features)
        with torch.no_grad():
            mlp.fc1.weight = nn.Parameter(mlp.fc1.weight[:units].clone())
            mlp.fc1.bias = nn.Parameter(mlp.fc1.bias[:units].clone())
            mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, :units].clone())
    return model


def padded_like(gradient: Tensor, whole: Tensor) -> Tensor:
    """Zeros for the units that are not used."""
    result = torch.zeros_like(whole)
    result[tuple(slice(0, size) for size in gradient.shape)] = gradient
    return result


def assert_near(ours: Tensor, expected: Tensor, name: str) -> None:
    """fp32 rounds at 6e-8, relative to the largest terms of a sum; the order of summation differs."""
    assert (ours - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("targets", ["largest", "labels"])
@pytest.mark.parametrize("strategy", ["none", "grouped"])
@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_gradients_are_the_sum_of_those_of_narrow_models(targets: str, strategy: str, kernels: str) -> None:
    of = config(
        *NESTED,
        f"task.targets={targets}",
        f"reduction.strategy={strategy}",
        f"kernels.mlp={kernels}",
        "model.drop_path=0.0",
    )
    model, runner = nested_model(of)
    batch = micro_batch(padding=1)
    assert runner.passes == 3
    total = torch.zeros(())
    own: dict[str, Tensor] = {}
    for index in range(runner.passes):
        loss = runner.loss(model, batch, index)
        assert loss.parts.keys() == {("largest", "smallest", "between")[index]}
        total = total + loss.total.detach()
        for name, gradient in gradients(loss.total, model).items():
            own[name] = own[name] + gradient if name in own else gradient

    expected: dict[str, Tensor] = {}
    expected_total = torch.zeros(())
    largest = None
    for width in runner.widths_of(batch.step):
        narrow = narrow_model(of, width)
        logits = narrow(batch.images)
        if largest is None or targets == "labels":
            loss = of.loss.weighted_sum(logits, batch.labels, batch.weights)
        else:
            loss = (softened_divergence(logits, largest) * batch.weights).sum()
        largest = logits.detach() if largest is None else largest
        expected_total = expected_total + loss.detach()
        for name, gradient in gradients(loss, narrow).items():
            padded = padded_like(gradient, own[name])
            expected[name] = expected[name] + padded if name in expected else padded
    torch.testing.assert_close(total, expected_total)
    assert own.keys() == expected.keys()
    for name, gradient in own.items():
        assert_near(gradient, expected[name], name)


def test_the_divergence_has_the_gradient_of_cross_entropy_with_soft_targets() -> None:
    """US-Nets' own loss; the divergence differs by the entropy of the targets."""
    logits, taught = (torch.randn(4, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    softened_divergence(ours, taught).sum().backward()
    (-(taught.softmax(1) * theirs.log_softmax(1)).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(softened_divergence(taught, taught), torch.zeros(4))


def test_widths_are_drawn_by_seed_and_step() -> None:
    def drawn(*settings: str) -> list[list[float]]:
        runner = NestedWidthRunner(config(*NESTED, *settings).task, config(*NESTED, *settings))  # type: ignore[arg-type]
        return [runner.widths_of(step) for step in range(40)]

    first = drawn()
    assert first == drawn() != drawn("seed=7")
    assert all(widths[:2] == [1.0, 0.25] for widths in first)
    counts = {width: sum(widths[2] == width for widths in first) for width in (0.5, 0.75)}
    assert sum(counts.values()) == 40
    assert min(counts.values()) > 8, "20 are expected; 8 or fewer have a probability below 1e-3"
    every = drawn("task.random_widths=5")
    assert all(sorted(widths) == [0.25, 0.5, 0.75, 1.0] for widths in every)


def test_a_recomputed_block_keeps_the_width_of_its_pass_and_few_programs_are_compiled() -> None:
    of = config(*NESTED, "kernels.mlp=eager", "model.drop_path=0.0")
    batch = micro_batch()
    expected = []
    model, runner = nested_model(of)
    for index in range(3):
        expected.append(gradients(runner.loss(model, batch, index).total, model))
    programs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        programs.append(graph)
        return graph.forward

    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.reset()
    blocks = transformer_blocks(model)
    compile_blocks(blocks, backend, forms=4)
    for block in blocks:
        compiled = block.forward
        block.forward = lambda x, run=compiled: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    try:
        for _ in range(2):
            for index in range(3):
                found = gradients(runner.loss(model, batch, index).total, model)
                for name, gradient in expected[index].items():
                    assert_near(found[name], gradient, name)
            assert len(programs) <= 2 * 3, "one for each block and width, and no more in the second step"
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits


# --- widths and cuts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task.widths=[0.5,0.25,1.0]"], "config: task.widths = [0.5, 0.25, 1.0]: must ascend to 1.0"),
        (["task.widths=[0.25,0.5]"], "widths = [0.25, 0.5]: must ascend to 1.0"),
        (
            ["task.widths=[0.3,1.0]"],
            "config: task.widths = [0.3, 1.0]: 0.3 of 192 hidden units are 57, not a multiple of 16: use 0.25 (48 "
            "units) or 0.3334 (64 units)",
        ),
        (
            ["task.widths=[0.01,1.0]"],
            "config: task.widths = [0.01, 1.0]: 0.01 of 192 hidden units are 1, not a multiple",
        ),
        (["model.name=vit_base_patch16_224", 'model.kwargs.act_layer="relu"'], "model: its MLPs cannot be computed by"),
    ],
)
def test_a_mistake_is_one_line(settings: list[str], message: str, place: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(config(*NESTED, *settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["none", "grouped", "shallow", "thin"])
def test_a_cut_model_is_described_and_computes_what_the_width_did(strategy: str, tmp_path: Path) -> None:
    of = config(*NESTED, f"reduction.strategy={strategy}", "model.kwargs.depth=4", "task.widths=[0.5,1.0]")
    model, _ = nested_model(of)
    plain = spread(build_model(of.model, of.reduction, seed=1)).eval()
    images = micro_batch().images
    with NestedWidths(model.eval()).at(0.5):
        expected = model(images)
    assert torch.equal(model(images), plain(images))
    assert not torch.allclose(plain(images), expected, rtol=0.1)
    description, reduction = cut_to_width(plain, 0.5, description=of.model, reduction=of.reduction)
    torch.testing.assert_close(plain(images), expected, atol=1e-4, rtol=1e-4)  # fp32, another order
    assert reduction.strategy == strategy

    cut = of.model_copy(update={"model": description, "reduction": reduction})
    path = write(tmp_path / "cut.safetensors", plain, cut)
    loaded = build_model(description.model_copy(update={"initial_weights": str(path)}), reduction, seed=5).eval()
    assert torch.equal(loaded(images), plain(images))


@pytest.mark.parametrize("strategy", ["none", "grouped"])
@pytest.mark.parametrize(
    "name", ["vit_giant_patch14_dinov2", "eva02_tiny_patch14_224", "vit_small_plus_patch16_dinov3"]
)
def test_gated_mlps_are_narrowed_and_cut(name: str, strategy: str) -> None:
    """Packed with the gate counted in timm's ratio, packed without, and separate layers."""
    kwargs = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    settings = [f"model.name={name}", f"model.kwargs={json.dumps(kwargs)}", f"reduction.strategy={strategy}"]
    of = config(*NESTED, *settings, "task.widths=[0.5,1.0]")
    model, _ = nested_model(of)
    images = micro_batch().images
    with NestedWidths(model.eval()).at(0.5):
        expected = model(images)
    plain = spread(build_model(of.model, of.reduction, seed=1)).eval()
    assert not torch.allclose(plain(images), expected, rtol=0.1)
    cut_to_width(plain, 0.5, description=of.model, reduction=of.reduction)
    torch.testing.assert_close(plain(images), expected, atol=1e-4, rtol=1e-4)


def test_a_cut_that_leaves_nothing_is_refused() -> None:
    of = config()
    model = build_model(of.model, of.reduction, seed=1)
    for width in (0.001, 1.5):
        with pytest.raises(SettingError, match=rf"width = {width}: must leave hidden units, and be at most 1"):
            cut_to_width(model, width, description=of.model, reduction=of.reduction)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return folder


@pytest.fixture
def place(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def test_a_run_resumes_bit_for_bit_and_is_evaluated_at_every_width(place: Path) -> None:
    whole = train("whole", *NESTED, steps=4)
    train("parts", *NESTED, steps=2)
    parts = train("parts", *NESTED, steps=4)
    tensors = load_file(whole / "final.safetensors")
    for key, tensor in load_file(parts / "final.safetensors").items():
        assert torch.equal(tensor, tensors[key]), key
    assert {"loss_largest", "loss_smallest", "loss_between"} <= metrics(whole)[0].keys()
    record = metrics(whole, "evaluation")[-1]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["ema"]["final_top1"] == record["ema_top1"], "the score is the full width's"

    # Each width is that of a plain model with the first units.
    of = load_config(whole / "config.json", [f"model.initial_weights={whole}/final_ema.safetensors"])
    found = evaluate(of)
    for name, value in found.items():
        assert value == pytest.approx(record[f"ema_{name}"], rel=1e-6), name
    checkpoint = sorted((whole / "checkpoints").glob("step-*"))[-1]
    width = 0.5
    model, description = model_of_checkpoint(checkpoint, ema=True)
    cut, reduction = cut_to_width(model, width, description=description.model, reduction=description.reduction)
    path = write(place / f"cut{width}.safetensors", model, of.model_copy(update={"model": cut, "reduction": reduction}))
    plain = load_config(
        whole / "config.json",
        [
            f"model.initial_weights={path}",
            f"model.kwargs.mlp_ratio={cut.kwargs['mlp_ratio']}",
            "task.name=classification",
        ],
    )
    ours = evaluate(plain)
    assert ours.keys() == {"top1", "top5", "loss"}
    assert ours["loss"] == pytest.approx(found[f"loss_width_{width:g}"], rel=1e-5)
    assert ours["top1"] == pytest.approx(found[f"top1_width_{width:g}"], abs=100 / 360 + 1e-9)  # one image at most
