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
from scalevit.checkpoint.restore import newest_whole, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver
from scalevit.config.loading import load_config
from scalevit.config.model import ModelConfig
from scalevit.config.training import CheckpointConfig, OptimizerConfig
from scalevit.distributed import World
from scalevit.engines.base import Engine, Setup
from scalevit.engines.factory import build_engine
from scalevit.engines.state import Piece
from scalevit.models.build import build_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.training.ema import Ema
from scalevit.training.optimizers import build_optimizer

REDUCTIONS = {"none": NoReduction(), "grouped": GroupedReduction(), "shallow": ShallowReduction()}
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.05)
MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    num_classes=5,
    drop_path=0.1,
    # Odd sizes: rows that do not divide by the ranks, and flat partitions that cut tensors anywhere.
    kwargs={"patch_size": 4, "embed_dim": 36, "depth": 2, "num_heads": 2},
)
MICRO_BATCHES, MICRO_BATCH = 4, 2
SAVED_AT, STEPS = 4, 24


def micro_batch(step: int, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = torch.randn(MICRO_BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(5, (MICRO_BATCH,), generator=generator)


class Run:
    """A tiny training run whose numbers depend on the step alone."""

    def __init__(self, cell: dict[str, Any], world: World):
        model = build_model(MODEL, REDUCTIONS[cell["reduction"]], seed=3)
        self.world, self.accumulation = world, MICRO_BATCHES // world.size
        setup = Setup(
            world=world,
            blocks=transformer_blocks(model),
            optimizer=partial(build_optimizer, config=OPTIMIZER),
            micro_batch=MICRO_BATCH,
            accumulation=self.accumulation,
            precision="fp32",
            clip_grad_norm=1.0,
        )
        self.engine = build_engine(model, setup, load_config(None, cell["settings"]).engine)
        self.ema = Ema(self.engine.local_parameters(), decay=0.9)
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
                loss = F.cross_entropy(self.engine(images).float(), labels)
                self.engine.backward(loss, last=a == self.accumulation - 1)
                total += loss.detach() / MICRO_BATCHES
            self.engine.step(OPTIMIZER.lr)
            self.ema.update(self.engine.local_parameters())
            losses.append(self.world.all_reduce_sum(total).item())
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training goes on from, whole, on every rank."""
        moments = self.engine.moments()
        parts = {
            "weights": self.engine.pieces(self.engine.local_parameters()),
            "ema": self.engine.pieces(self.ema.tensors),
            "exp_avg": moments.exp_avg,
            "exp_avg_sq": moments.exp_avg_sq,
        }
        return assemble(self.engine, {f"{part}.{n}": p for part, held in parts.items() for n, p in held.items()})

    def end(self, losses: list[float]) -> dict[str, Any]:
        """What is compared; the process goes on to other engines."""
        tensors = self.tensors()
        self.engine.close()
        return {"losses": losses, "tensors": tensors}


def assemble(engine: Engine, pieces: dict[str, Piece]) -> dict[str, Tensor]:
    own = [(name, piece.start, piece.values.clone(), piece.shape) for name, piece in pieces.items()]
    whole: dict[str, Tensor] = {}
    for name, start, values, shape in engine.world.gather(own):
        tensor = whole.setdefault(name, torch.full((shape.numel(),), float("nan")))
        tensor[start : start + values.numel()] = values
    return whole


def read_alone(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, flat, by safetensors and nothing of ours or torch's."""
    shapes = json.loads((checkpoint / "state.json").read_text())["tensors"]
    whole: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            ranges = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():  # noqa: SIM118 (no mapping)
                numel = torch.Size(shapes[key.split(".", 1)[1]]).numel()
                tensor = whole.setdefault(key, torch.full((numel,), float("nan")))
                (start,) = ranges[key]["saved_offsets"]
                values = file.get_tensor(key)
                assert tensor[start : start + values.numel()].isnan().all(), f"{key}: written twice"
                tensor[start : start + values.numel()] = values
    return whole


def save(cell: dict[str, Any], folder: Path, world: World) -> dict[str, Any]:
    run = Run(cell, world)
    run.train(0, SAVED_AT)
    saver = Saver(folder / cell["id"], world, CheckpointConfig())
    saver.save(run.engine, run.ema, RunState(step=SAVED_AT), {"config": {}, "data": {}}, score=None)
    before = run.tensors()
    if cell["native"]:
        run.engine.save_native(folder / f"{cell['id']}-native", "global_step", SAVED_AT)
    losses = run.train(SAVED_AT, STEPS)  # while it is written
    saver.wait()
    read = read_alone(folder / cell["id"] / f"step-{SAVED_AT:08d}")
    assert read.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(read[name], tensor), f"{name} was not saved as it was"
    return run.end(losses)


def resume(cell: dict[str, Any], source: str, folder: Path, world: World) -> dict[str, Any]:
    run = Run(cell, world)
    run.train(0, 1)  # everything must come from the checkpoint
    checkpoint = newest_whole([folder / source / f"step-{SAVED_AT:08d}"], world)
    state = restore(checkpoint, run.engine, run.ema)
    assert state.step == SAVED_AT
    read = read_alone(checkpoint)
    for name, tensor in run.tensors().items():
        assert torch.equal(read[name], tensor), f"{name} was not restored as it was"
    assert run.engine.moments().steps == SAVED_AT
    return run.end(run.train(SAVED_AT, STEPS))


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
