"""One rank of the engine tests: runs cases one after another, so that torch and DeepSpeed are imported once.

Usage: RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python parity_worker.py CASES.json RESULTS.pt
"""

import dataclasses
import json
import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from scalevit.config import GroupedReduction, KernelsConfig, ModelConfig, NoReduction, OptimizerConfig, ShallowReduction
from scalevit.config_file import load_config
from scalevit.engines import Setup, World, build_engine
from scalevit.models import build_model, fuse_mlps, mlp_blocks
from scalevit.optim import build_optimizer
from scalevit.tying import uses_per_parameter

REDUCTIONS = {"none": NoReduction(), "grouped": GroupedReduction(), "shallow": ShallowReduction()}
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.05)
MICRO_BATCHES, MICRO_BATCH, STEPS = 4, 4, 6  # 4 micro-batches a step divide over 1, 2 and 4 ranks


def tiny_model(reduction: str) -> nn.Module:
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=16,
        num_classes=5,
        drop_path=0.1,
        kwargs={"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2},
    )
    return build_model(config, REDUCTIONS[reduction], seed=3)


def micro_batch(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = torch.randn(MICRO_BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (MICRO_BATCH,), generator=generator)


def reference(case: dict, skipped: int = 0) -> dict:
    """The same training in plain PyTorch, one process, with the first `skipped` steps not taken."""
    model = tiny_model(case["reduction"])
    optimizer = build_optimizer(model, OPTIMIZER)
    losses, norms = [], []
    for step in range(case.get("steps", STEPS)):
        total = 0.0
        for index in range(MICRO_BATCHES):
            images, labels = micro_batch(step, index)
            torch.manual_seed(step * 100 + index)
            loss = F.cross_entropy(model(images), labels)
            (loss / MICRO_BATCHES).backward()
            total += loss.item() / MICRO_BATCHES
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.get("clip") or float("inf"))
        if step >= skipped:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(norm.item())
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}


def run_case(case: dict, world: World) -> dict:
    model = tiny_model(case["reduction"])
    blocks = mlp_blocks(model)
    fuse_mlps(model, KernelsConfig(), torch.device("cpu"))
    config = load_config(None, case["settings"])
    accumulation = MICRO_BATCHES // world.size
    setup = Setup(
        world=world,
        blocks=blocks,
        optimizer=partial(build_optimizer, config=OPTIMIZER),
        micro_batch=MICRO_BATCH,
        accumulation=accumulation,
        precision=case.get("precision", "fp32"),
        clip_grad_norm=case.get("clip"),
        activation_checkpointing=case.get("checkpointing", False),
    )
    uses = uses_per_parameter(model)
    engine = build_engine(model, setup, config.engine)
    engine.train()
    if "loss_scale" in case:
        engine.loss_scale.value = case["loss_scale"]
    result: dict = {"losses": [], "norms": [], "skipped": 0}
    for step in range(case.get("steps", STEPS)):
        if step == case.get("reload_at"):
            engine = _reloaded(engine, case, setup, config)
        total = torch.zeros(())
        for a in range(accumulation):
            index = a * world.size + world.rank
            images, labels = micro_batch(step, index)
            torch.manual_seed(step * 100 + index)
            loss = F.cross_entropy(engine(images).float(), labels)
            engine.backward(loss, last=a == accumulation - 1)
            total += loss.detach() / MICRO_BATCHES
        outcome = engine.step(OPTIMIZER.lr)
        result["losses"].append(world.all_reduce_sum(total).item())
        result["norms"].append(outcome.grad_norm)
        result["skipped"] += outcome.skipped
    result["weights"] = engine.gather(engine.local_parameters())
    result["moments"] = engine.optimizer_state()
    assert engine.module.training
    _check_other_weights(engine)
    assert uses_per_parameter(engine.module) == uses
    return result


def _reloaded(engine, case, setup, config):
    """A fresh engine that takes over weights and optimizer state in their full form."""
    weights, state = engine.gather(engine.local_parameters()), engine.optimizer_state()
    boxes = [weights, state]
    dist.broadcast_object_list(boxes, src=0)
    model = tiny_model(case["reduction"])
    blocks = mlp_blocks(model)
    fuse_mlps(model, KernelsConfig(), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # everything must come from the state
    fresh = build_engine(model, dataclasses.replace(setup, blocks=blocks), config.engine)
    fresh.load_weights(boxes[0])
    fresh.load_optimizer_state(boxes[1])
    fresh.train()
    return fresh


def _check_other_weights(engine) -> None:
    """`using` evaluates other weights and puts the own ones back, bit for bit."""
    images, _ = micro_batch(0, 0)
    engine.eval()
    with torch.no_grad():
        own = engine(images).clone()
        zeros = {name: torch.zeros_like(t) for name, t in engine.local_parameters().items()}
        with engine.using(zeros):
            assert (engine(images) == 0).all(), "zero weights must give zero logits"
        assert torch.equal(engine(images), own), "the own weights are back"
    engine.train()


def main() -> None:
    cases_path, results_path = sys.argv[1:]
    with open(cases_path) as file:
        cases = json.load(file)
    world = World.from_environment()
    with world.process_group():
        results = {case["id"]: run_case(case, world) for case in cases}
    if world.is_first:
        torch.save(results, results_path)


if __name__ == "__main__":
    main()
