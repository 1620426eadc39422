"""Killed at random moments, also in a save, a run resumes from an intact checkpoint to the same weights."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launching import QUICKSTART, SECONDS, Ranks, Workplace
from scalevit.checkpoint.folder import find_damage, list_checkpoints

SETTINGS = [
    "data.workers=0",
    "data.augmentation.mixup=0.8",
    "model.drop_path=0.2",
    "model.kwargs.depth=2",
    "model.kwargs.embed_dim=48",
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.log_every_steps=1",
    "train.checkpoint.every_steps=3",
    "evaluation.every_epochs=50",
    "schedule.warmup_epochs=0",
    "schedule.update=step",
]
ENGINES = {"zero2": ["engine.stage=2"], "fsdp": ["engine.name=fsdp"]}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Workplace:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return Workplace(folder)


def start(workplace: Workplace, name: str, *settings: str) -> Ranks:
    """Two of them."""
    return workplace.start(name, ["--config", QUICKSTART, f"name={name}", *SETTINGS, *settings], ranks=2)


def steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0


def kill_when_due(workplace: Workplace, name: str, settings: list[str], chance: random.Random) -> str:
    """Kills both ranks after a few steps: in the middle of a save, or at any moment. Returns what it waited for."""
    folder = workplace.folder / "runs" / name
    wanted = chance.choice(["a save", "any moment"])
    ranks = start(workplace, name, *settings)
    begun, deadline = time.time(), time.monotonic() + SECONDS
    steps = chance.randrange(1, 6)
    resumed_at: int | None = None
    while True:
        assert time.monotonic() < deadline, workplace.log(name)[-3000:]
        if resumed_at is None and (folder / "environment.json").exists():
            if (folder / "environment.json").stat().st_mtime > begun:
                resumed_at = steps_done(folder)  # its metrics were cut to where it goes on
        elif resumed_at is not None and steps_done(folder) >= resumed_at + steps:
            if wanted == "any moment":
                time.sleep(chance.uniform(0, 0.3))
                break
            if any((folder / "checkpoints").glob(".step-*.tmp")):
                break
        time.sleep(0.001)
    for process in chance.sample(ranks.processes, 2):
        os.kill(process, signal.SIGKILL)
    assert ranks.end() == [-signal.SIGKILL] * 2, workplace.log(name)[-3000:]
    return wanted


def check_kills(workplace: Workplace, engine: str, *, kills: int, steps: int) -> dict[str, Any]:
    """Returns what happened."""
    name, undisturbed = f"{engine}_{kills}", f"{engine}_{kills}_undisturbed"
    settings = [*ENGINES[engine], f"train.max_steps={steps}"]
    start(workplace, undisturbed, *settings, "train.checkpoint.asynchronous=false").wait()
    chance = random.Random(kills)
    folder = workplace.folder / "runs" / name
    torn, waited_for = 0, []
    for _ in range(kills):
        waited_for.append(kill_when_due(workplace, name, settings, chance))
        checkpoints = list_checkpoints(folder / "checkpoints")
        for checkpoint in checkpoints:
            assert find_damage(checkpoint) == [], "a checkpoint with a name is whole"
        torn += any((folder / "checkpoints").glob(".step-*"))
    assert steps_done(folder) < steps, "the run was over before its kills"
    start(workplace, name, *settings).wait()
    log = workplace.log(name)
    assert "warning" not in log
    for file in ("final.safetensors", "final_ema.safetensors"):
        ours, theirs = (load_file(workplace.folder / "runs" / run / file) for run in (name, undisturbed))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{file}: {key} differs from the undisturbed run's"
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines() if '"train"' in line]
        for path in (workplace.folder / "runs" / run / "metrics.jsonl" for run in (name, undisturbed))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps
    return {
        "engine": engine,
        "ranks": 2,
        "kills": kills,
        "aimed_at_a_save": waited_for.count("a save"),
        "kills_that_left_a_half_written_checkpoint": torn,
        "steps": steps,
        "resumed": log.count("resuming"),
        "final_weights": "bitwise equal",
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_a_few_times(workplace: Workplace, engine: str) -> None:
    check_kills(workplace, engine, kills=4, steps=90)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_thirty_times(workplace: Workplace, engine: str) -> None:
    print(json.dumps(check_kills(workplace, engine, kills=30, steps=240)))  # see docs/results/kills.json
