"""One rank of the engine tests: runs cells one after another, so that torch and DeepSpeed are imported once.

A cell is a dict: `id`, `settings` (config overrides of the engine), `reduction`, `accumulation`, and what it changes:
`checkpointing`, `clip`, `clip_mode`, `precision`, `loss_scale`, `compile`, `meta_init`, `steps`, `count`, `depth`,
`width`, `optimizer` (a key of OPTIMIZERS), `frozen` (beginnings of names of parameters that are not trained), `moved`
(after this step, everything goes through slices into a new engine), `refused` (the engine is).

Usage: RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python parity_worker.py CELLS.json RESULTS.pt
"""

import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import nn

from scalevit.config.loading import load_config
from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.config.training import OptimizerConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine, EngineSpec
from scalevit.engines.clipping import Clipping
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.fused_mlp import fuse_mlps
from scalevit.models.meta_init import initial_values
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.training.optimizers import build_optimizer, update_scope
from scalevit.tying import uses_per_parameter
from wire import WireCounter

REDUCTIONS = {"baseline": NoReduction(), "grouped": GroupedReduction(), "shallow": ShallowReduction()}
# eps: Adam turns an error of d in a gradient near zero into d / eps of a step. A key bias has no gradient but rounding
# noise (softmax does not see it), and other biases have single elements near zero, so that with 1e-5 the weights differ
# by up to 4e-5 between orders of summation, depending on the CPU. Half of all gradients are larger than 5e-3 here.
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.05, args={"eps": 1e-3})
# Sign updates turn rounding into whole steps where a gradient is nothing else; a small rate keeps that small.
OPTIMIZERS = {
    "adamw": OPTIMIZER,
    "momentum": OptimizerConfig(name="momentum", lr=0.05, args={"momentum": 0.9}),
    "lion": OptimizerConfig(name="lion", lr=1e-5),
    "nadamw": OptimizerConfig(name="nadamw", lr=2e-3, args={"eps": 1e-3}),
    "adan": OptimizerConfig(name="adan", lr=2e-3, args={"eps": 1e-3}),
    "lamb": OptimizerConfig(name="lamb", lr=2e-3, args={"eps": 1e-3}),
    "novograd": OptimizerConfig(name="novograd"),
    "muon": OptimizerConfig(name="muon", lr=2e-5),  # it orthogonalises in bf16, whose rounding the rate scales
    "undecayed": OptimizerConfig(lr=2e-3, weight_decay=0.0, args={"eps": 1e-3}),  # one group, of the frozen ones too
    "adafactor": OptimizerConfig(name="adafactorbv", lr=2e-3, args={"min_dim_size_to_factor": 16}),
}
MICRO_BATCH, STEPS, SEED = 4, 20, 3
CLASSIFIER = frozenset({"head.weight", "head.bias"})


def model_config(depth: int = 4, width: int = 32) -> ModelConfig:
    return ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=16,
        num_classes=5,
        drop_path=0.1,
        kwargs={"patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 2},
    )


def tiny_model(reduction: str, *sizes: int, device: str = "cpu") -> nn.Module:
    return build_model(model_config(*sizes), REDUCTIONS[reduction], seed=SEED, device=device)


def freeze(model: nn.Module, frozen: Sequence[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    return model


def micro_batch(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = torch.randn(MICRO_BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (MICRO_BATCH,), generator=generator)


@cache
def reference(
    reduction: str,
    micro_batches: int,
    clip: float | None,
    steps: int,
    skipped: int = 0,
    depth: int = 4,
    optimizer_name: str = "adamw",
    frozen: tuple[str, ...] = (),
    clip_mode: str = "norm",
) -> dict[str, Any]:
    """The same training in plain PyTorch, one process, with the first `skipped` steps not taken."""
    model = freeze(tiny_model(reduction, depth), frozen)
    optimizer = build_optimizer(model, OPTIMIZERS[optimizer_name])
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for index in range(micro_batches):
            images, labels = micro_batch(step, index)
            torch.manual_seed(step * 100 + index)
            loss = F.cross_entropy(model(images), labels)
            (loss / micro_batches).backward()
            total += loss.item() / micro_batches
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if clip is not None:
            dispatch_clip_grad(model_parameters(model, exclude_head=clip_mode == "agc"), clip, clip_mode)
        if step >= skipped:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(norm.item())
    return {"losses": losses, "norms": norms, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def run_cell(cell: dict[str, Any], world: World) -> dict[str, Any]:
    accumulation = cell["accumulation"]
    config = load_config(None, [*cell["settings"], f"train.precision={cell.get('precision', 'fp32')}"])
    model, spec = _prepare(cell, world)
    uses = uses_per_parameter(model)
    if cell.get("refused"):
        try:
            config.engine.build(model, spec)
        except UserError as error:
            return {"refused": str(error)}
    engine = config.engine.build(model, spec)
    engine.train()
    if "loss_scale" in cell:
        engine.loss_scale.value = cell["loss_scale"]
    # Copies: what is on one rank alone may be gathered as it lies.
    initial = {name: tensor.clone() for name, tensor in engine.gather(engine.local_parameters()).items()}
    result: dict[str, Any] = {"initial": initial, "losses": [], "norms": [], "skipped": 0}
    for step in range(cell.get("steps", STEPS)):
        total = torch.zeros(())
        # Not everywhere: nothing is compiled under a dispatch mode.
        with WireCounter() if cell.get("count") else nullcontext() as wire:
            for a in range(accumulation):
                index = a * world.size + world.rank
                images, labels = micro_batch(step, index)
                torch.manual_seed(step * 100 + index)
                loss = F.cross_entropy(engine.forward(images).float(), labels)
                engine.backward(loss / (world.size * accumulation), last=a == accumulation - 1)
                total += loss.detach() / (world.size * accumulation)
            outcome = engine.step(OPTIMIZERS[cell.get("optimizer", "adamw")].lr)
        result["wire"] = wire.counts() if wire else {}  # the last step's
        result["losses"].append(world.all_reduce_sum(total).item())
        result["norms"].append(outcome.grad_norm)
        result["skipped"] += outcome.skipped
        if step == cell.get("moved"):
            engine = _moved(engine, config.engine.build(*_prepare(cell, world)))
    result["weights"] = engine.gather(engine.local_parameters())
    steps = {int(step) for step in engine.optimizer_state().scalars.get("step", {}).values()}
    result["optimizer_steps"] = steps.pop() if len(steps) == 1 else None
    result["parameters"] = sum(tensor.numel() for tensor in result["weights"].values())
    assert engine.module.training
    _check_other_weights(engine)
    assert uses_per_parameter(engine.module) == uses
    engine.close()
    return result


def _prepare(cell: dict[str, Any], world: World) -> tuple[nn.Module, EngineSpec]:
    sizes = cell.get("depth", 4), cell.get("width", 32)
    on_meta = cell.get("meta_init", False)
    model = tiny_model(cell["reduction"], *sizes, device="meta" if on_meta else "cpu")
    freeze(model, cell.get("frozen", ()))
    values = partial(initial_values, model_config(*sizes), REDUCTIONS[cell["reduction"]], seed=SEED)
    optimizer = OPTIMIZERS[cell.get("optimizer", "adamw")]
    spec = EngineSpec(
        world=world,
        blocks=transformer_blocks(model),
        optimizer=partial(build_optimizer, config=optimizer),
        update_scope=update_scope(optimizer.name, optimizer.args),
        micro_batch=MICRO_BATCH,
        accumulation=cell["accumulation"],
        precision=cell.get("precision", "fp32"),
        clipping=Clipping(cell.get("clip"), cell.get("clip_mode", "norm"), CLASSIFIER),
        activation_checkpointing=cell.get("checkpointing", False),
        compile=cell.get("compile"),
        initial_values=values if on_meta else None,
    )
    return fuse_mlps(model, KernelsConfig(), torch.device("cpu")), spec


def _moved(old: Engine, new: Engine) -> Engine:
    """A new engine with the weights and the optimizer state of an old one, taken and given as a checkpoint does."""
    state, weights = old.optimizer_state(), old.slices(old.local_parameters())
    for name, slice_ in new.slices(new.local_parameters()).items():
        slice_.values.copy_(weights[name].values)
    new.commit_parameters()
    tensors = new.optimizer_state_layout(state.describe())
    for key, slices in tensors.items():
        for name, slice_ in slices.items():
            slice_.values.copy_(state.tensors[key][name].values)
    new.load_optimizer_state(replace(state, tensors=tensors))
    old.close()
    new.train()
    return new


def _check_other_weights(engine) -> None:
    """`using` evaluates other weights and puts the own ones back, bit for bit."""
    images, _ = micro_batch(0, 0)
    engine.eval()
    with torch.no_grad():
        own = engine.forward(images).clone()
        zeros = {name: torch.zeros_like(t) for name, t in engine.local_parameters().items()}
        with engine.using(zeros):
            assert (engine.forward(images) == 0).all(), "zero weights must give zero logits"
            assert any(tensor.any() for tensor in zeros.values()), "meanwhile the own weights lie here"
        assert torch.equal(engine.forward(images), own), "the own weights are back"
        assert not any(tensor.any() for tensor in zeros.values()), "and so are the others"
    engine.train()


def main() -> None:
    cells_path, results_path = sys.argv[1:]
    with open(cells_path) as file:
        cells = json.load(file)
    world = World.from_environment()
    results = {}
    with world.process_group():
        torch.set_num_threads(1)  # ranks and other tests share the cores, and two threads would wait for each other
        for cell in cells:
            started = time.perf_counter()
            results[cell["id"]] = run_cell(cell, world)
            gc.collect()  # engines hang in cycles of hooks
            if world.is_first:
                print(f"{cell['id']}: {time.perf_counter() - started:.1f} s", flush=True)
    if world.is_first:
        torch.save(results, results_path)


if __name__ == "__main__":
    main()
