"""One rank of the planner's test: trains small models on every engine, and counts what the rank holds and sends.

Usage: RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python accounting_worker.py CASES.json RESULTS.json
"""

import gc
import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalevit.config.loading import load_config
from scalevit.config.model import ModelConfig
from scalevit.config.training import EmaConfig, OptimizerConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine, EngineSpec
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.training.ema import Ema
from scalevit.training.optimizers import build_optimizer

# Some parameters above and some below 1e5 elements, where ZeRO-3 keeps them whole; rows that 2 ranks do not divide.
MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    num_classes=5,
    drop_path=0.0,
    kwargs={"patch_size": 4, "embed_dim": 192, "depth": 4, "num_heads": 2},
)
REDUCTIONS = {"none": NoReduction(), "grouped": GroupedReduction()}
MICRO_BATCH = 16  # activations outweigh the weights, as in real runs

_sent: Counter[str] = Counter()


def count_collectives() -> None:
    """Wraps the process group's own methods, below everything that calls them."""
    group = torch._C._distributed_c10d.ProcessGroup
    names = [n for n in dir(group) if any(w in n for w in ("reduce", "gather", "broadcast", "alltoall", "send"))]
    for name in names:
        if callable(getattr(group, name)):
            kind = "all_gather" if "gather" in name else "all_reduce" if "allreduce" in name else name
            setattr(group, name, _counted(getattr(group, name), "reduce_scatter" if "reduce_scatter" in name else kind))


def _counted(call: Any, kind: str) -> Any:
    def counted(*args: Any, **named: Any) -> Any:
        # The full tensor is the input of a reduction and the output of a gather: in any case the larger.
        sizes = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args]
        _sent[kind] += max(sizes, default=0)
        return call(*args, **named)

    return counted


class Peak(TorchDispatchMode):
    """The most bytes of storages that operators create while it is active; asks their sizes, as FSDP2 changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) is Tensor}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in before:
                    self._storages[storage._cdata] = weakref.ref(storage)
        alive = {key: s for key, s in ((k, ref()) for k, ref in self._storages.items()) if s is not None}
        self._storages = {key: self._storages[key] for key in alive}
        self.bytes = max(self.bytes, sum(s.nbytes() for s in alive.values()))
        return out


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Sizes of the unique storages in memory."""
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    kept = [t for t in local if type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}


def everything() -> dict[int, int]:
    gc.collect()
    return storages(o for o in gc.get_objects() if issubclass(type(o), Tensor))


def held(engine: Engine, ema: Ema, before: dict[int, int]) -> dict[str, int]:
    """Bytes by purpose, after the last backward and before the step; `all` are the process's tensors, named or not."""
    stage = getattr(engine, "stage", None)
    parameters: list[Any] = list(engine.module.parameters())
    weights = [*parameters, *(p.ds_tensor for p in parameters)] if stage == 3 else parameters
    optimizer = [t for state in engine.optimizer.state.values() for t in state.values()]
    if stage:
        zero = engine.engine.optimizer
        optimizer += zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        gradients = zero.averaged_gradients
    else:
        gradients = [p.grad for p in parameters]
    purposes = {
        "weights": weights,
        "optimizer": optimizer,
        "gradients": tree_leaves(gradients),
        "ema": ema.tensors.values(),
    }
    counted = {name: sum(storages(tensors).values()) for name, tensors in purposes.items()}
    counted["all"] = sum(size for key, size in everything().items() if key not in before)
    return counted


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    before = everything()
    model = build_model(MODEL, REDUCTIONS[case["reduction"]], seed=0)
    engine = load_config(None, case["settings"]).engine.build(
        model,
        EngineSpec(
            world=world,
            blocks=transformer_blocks(model),
            optimizer=partial(build_optimizer, config=OptimizerConfig()),
            micro_batch=MICRO_BATCH,
            accumulation=case["accumulation"],
            precision="fp32",
        ),
    )
    ema = Ema(engine.local_parameters(), EmaConfig(decay=0.9))
    engine.train()
    result: dict[str, Any] = {}
    for step in range(3):  # ZeRO-3 learns the order of parameters in the first
        _sent.clear()
        peak = Peak()
        for a in range(case["accumulation"]):
            images, targets = torch.zeros(MICRO_BATCH, 3, 16, 16), torch.zeros(MICRO_BATCH, 5)
            with peak:
                loss = F.cross_entropy(engine.forward(images), targets)
                engine.backward(loss, last=a == case["accumulation"] - 1)
            del images, targets, loss
        if step == 2:
            world.any(False)  # what is on its way between ranks arrives, and its buffers are freed
            result["held"] = held(engine, ema, before)
        engine.step(1e-3)
        ema.update(engine.local_parameters(), step + 1)
        result["sent"] = dict(_sent)
        result["peak"] = peak.bytes
    return result


def main() -> None:
    cases_path, results_path = sys.argv[1:]
    with open(cases_path) as file:
        cases = json.load(file)
    count_collectives()
    world = World.from_environment()
    with world.process_group():
        results = {case["id"]: run_case(case, world) for case in cases}
    if world.is_first:
        with open(results_path, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
