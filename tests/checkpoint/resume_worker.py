"""One rank of the tests that save under one engine and world size and go on under another.

Usage: RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python resume_worker.py CASES.json FOLDER

Groups of 1, 2 and 4 ranks run at once, each with its processes started once: each trains and saves its own cells,
waits for what the others saved, and goes on from that.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from launching import SECONDS
from scalevit.checkpoint.restore import newest_intact, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver
from scalevit.config.loading import load_config
from scalevit.config.model import ModelConfig
from scalevit.config.training import CheckpointConfig, EmaConfig, OptimizerConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine, EngineSpec
from scalevit.engines.clipping import Clipping
from scalevit.engines.state import TensorSlice
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.training.ema import Ema
from scalevit.training.optimizers import build_optimizer, update_scope

REDUCTIONS = {"none": NoReduction(), "grouped": GroupedReduction(), "shallow": ShallowReduction()}
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.05)
OPTIMIZERS = {
    "adamw": OPTIMIZER,
    "momentum": OptimizerConfig(name="momentum", lr=0.05),
    "lion": OptimizerConfig(name="lion", lr=1e-5),
    "nadamw": OptimizerConfig(name="nadamw", lr=2e-3),
    "nadam": OptimizerConfig(name="nadam", lr=2e-3),
    "adan": OptimizerConfig(name="adan", lr=2e-3),
    "lamb": OptimizerConfig(name="lamb", lr=2e-3),
    "muon": OptimizerConfig(name="muon", lr=2e-5),  # it orthogonalises in bf16, whose rounding the rate scales
    # Factored: rows and columns of at least 16.
    "adafactor": OptimizerConfig(name="adafactorbv", lr=2e-3, args={"min_dim_size_to_factor": 16}),
}
MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    num_classes=5,
    drop_path=0.1,
    # Odd sizes: rows that do not divide by the ranks, and flat partitions that cut tensors anywhere.
    kwargs={"patch_size": 4, "embed_dim": 36, "depth": 2, "num_heads": 2},
)
MICRO_BATCHES, MICRO_BATCH = 4, 2
SAVED_AT = 4


def micro_batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = torch.randn(MICRO_BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (MICRO_BATCH,), generator=generator)


class Run:
    """A tiny training run whose numbers depend on the step alone."""

    def __init__(self, cell: dict[str, Any], world: World):
        model = build_model(MODEL, REDUCTIONS[cell["reduction"]], seed=3)
        self.world, self.accumulation = world, MICRO_BATCHES // world.size
        self.optimizer = OPTIMIZERS[cell.get("optimizer", "adamw")]
        spec = EngineSpec(
            world=world,
            blocks=transformer_blocks(model),
            optimizer=partial(build_optimizer, config=self.optimizer),
            update_scope=update_scope(self.optimizer.name, self.optimizer.args),
            micro_batch=MICRO_BATCH,
            accumulation=self.accumulation,
            precision="fp32",
            clipping=Clipping(1.0),
        )
        self.engine = load_config(None, cell["settings"]).engine.build(model, spec)
        self.ema = Ema(self.engine.local_parameters(), EmaConfig(decay=0.9, warmup=True))
        self.engine.train()

    def train(self, first: int, last: int) -> list[float]:
        """The losses of steps first to last - 1."""
        losses = []
        for step in range(first, last):
            total = torch.zeros(())
            for a in range(self.accumulation):
                index = a * self.world.size + self.world.rank
                images, labels = micro_batch(step, index)
                torch.manual_seed(step * 100 + index)
                loss = F.cross_entropy(self.engine.forward(images).float(), labels)
                self.engine.backward(loss / MICRO_BATCHES, last=a == self.accumulation - 1)
                total += loss.detach() / MICRO_BATCHES
            self.engine.step(self.optimizer.lr)
            self.ema.update(self.engine.local_parameters(), step + 1)
            losses.append(self.world.all_reduce_sum(total).item())
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training resumes from, whole, on every rank."""
        parts = {
            "weights": self.engine.slices(self.engine.local_parameters()),
            "ema": self.engine.slices(self.ema.tensors),
            **{f"optimizer.{name}": slices for name, slices in self.engine.optimizer_state().tensors.items()},
        }
        return assemble(self.engine, {f"{part}.{n}": p for part, held in parts.items() for n, p in held.items()})

    def scalars(self) -> dict[str, dict[str, float]]:
        """The optimizer's, as numbers."""
        state = self.engine.optimizer_state()
        return {name: {key: float(value) for key, value in own.items()} for name, own in state.scalars.items()}

    def end(self, losses: list[float]) -> dict[str, Any]:
        """What is compared; the process goes on to other engines."""
        tensors = self.tensors()
        self.engine.close()
        return {"losses": losses, "tensors": tensors}


def assemble(engine: Engine, slices: dict[str, TensorSlice]) -> dict[str, Tensor]:
    own = [(name, part.start, part.values.clone(), part.shape) for name, part in slices.items()]
    whole: dict[str, Tensor] = {}
    for name, start, values, shape in engine.world.gather(own):
        tensor = whole.setdefault(name, torch.full((shape.numel(),), float("nan"), dtype=values.dtype))
        tensor[start : start + values.numel()] = values
    return whole


def read_alone(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, flat, by safetensors and nothing of ours or torch's."""
    record = json.loads((checkpoint / "state.json").read_text())
    shapes = {f"{part}.{name}": shape for part in record["parts"] for name, shape in record["tensors"].items()}
    for part, kept in record["optimizer"]["tensors"].items():
        shapes |= {f"optimizer.{part}.{name}": shape for name, shape in (kept["shapes"] or {}).items()}
    whole: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            ranges = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118 (no mapping)
                (start,) = ranges[key]["saved_offsets"]
                values = file.get_tensor(key)
                empty = torch.full((torch.Size(shapes[key]).numel(),), float("nan"), dtype=values.dtype)
                tensor = whole.setdefault(key, empty)
                assert tensor[start : start + values.numel()].isnan().all(), f"{key}: written twice"
                tensor[start : start + values.numel()] = values
    return whole


def save(cell: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    run = Run(cell, world)
    run.train(0, SAVED_AT)
    saver = Saver(folder / cell["id"], world, CheckpointConfig())
    scalars = run.scalars()
    saver.save(run.engine, run.ema.tensors, RunState(step=SAVED_AT), {"config": {}, "data": {}}, score=None)
    before = run.tensors()
    if cell.get("native"):
        run.engine.save_native(folder / f"{cell['id']}-native", "global_step", SAVED_AT)
    losses = run.train(SAVED_AT, cell["steps"])  # while it is written
    saver.wait()
    read = read_alone(folder / cell["id"] / f"step-{SAVED_AT:08d}")
    assert read.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(read[name], tensor), f"{name} was not saved as it was"
    return {**run.end(losses), "scalars": scalars}


def resume(cell: dict[str, Any], source: str, folder: Path, world: World) -> dict[str, Any]:
    run = Run(cell, world)
    run.train(0, cell.get("steps_before", 1))  # everything must come from the checkpoint
    checkpoint = newest_intact([folder / source / f"step-{SAVED_AT:08d}"], world)
    state = restore(checkpoint, run.engine, run.ema.tensors)
    assert state.step == SAVED_AT
    read = read_alone(checkpoint)
    for name, tensor in run.tensors().items():
        assert torch.equal(read[name], tensor), f"{name} was not restored as it was"
    scalars = run.scalars()
    return {**run.end(run.train(SAVED_AT, cell["steps"])), "scalars": scalars}


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    world = World.from_environment()
    results = {}
    with world.process_group():
        for cell in cases["cells"]:
            if cell["ranks"] == world.size:
                results[cell["id"]] = save(cell, folder, world)
        dist.barrier()
        if world.is_first:
            (folder / f"saved-{world.size}").touch()
        deadline = time.monotonic() + SECONDS
        while not all((folder / f"saved-{ranks}").exists() for ranks in cases["groups"]):
            assert time.monotonic() < deadline, "another group did not finish"
            time.sleep(0.2)
        cells = {cell["id"]: cell for cell in cases["cells"]}
        for source, target in cases["moves"]:
            if cells[target]["ranks"] == world.size:
                results[f"{source}->{target}"] = resume(cells[target], source, folder, world)
    if world.is_first:
        torch.save(results, folder / f"results-{world.size}.pt")


if __name__ == "__main__":
    main()
