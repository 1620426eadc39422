"""Cases of tests/test_troubleshooting.py: messages about models, runs, checkpoints and launchers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from message_case import TINY, Place, case
from scalevit.checkpoint.folder import lock
from scalevit.checkpoint.restore import newest_intact
from scalevit.cli.main import main
from scalevit.data.loading.train_loader import check_fingerprint
from scalevit.distributed import World
from scalevit.errors import UserError, naming_settings
from scalevit.launchers import find_launch
from scalevit.models.api import create_model
from scalevit.models.build import build_model
from scalevit.models.weights.write import write_weights
from scalevit.runs.folder import RunFolder
from scalevit.runs.trackers.base import RunInfo
from scalevit.runs.tracking import Tracking
from scalevit.training.micro_batch import TRAINING_KNOBS, naming_out_of_memory
from scalevit.training.run import prepare_evaluation
from scalevit.training.setting_keys import DATA_KEYS, TRACKER_KEYS
from scalevit.training.step import DivergenceCheck, StepResult
from scalevit.tying import canonical_state, tied_names

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))

# --- models and weights -----------------------------------------------------------------------------------


@case("config: model.name = ...: is not a timm model; nearest: ...")
def _(place: Place) -> None:
    place.prepare("model.name=vit_smal_patch16_224")


@case("model ... is not supported: expected ...")
def _(place: Place) -> None:
    create_model("resnet18")


@case("model ... is not supported: blocks.0 has ..., expected timm's Mlp (fc1, act, fc2)")
def _(place: Place) -> None:
    create_model("vit_giant_patch14_dinov2", depth=1, embed_dim=48, num_heads=2)


@case("config: model.image_size = ...: is not a multiple of the patch size ...")
def _(place: Place) -> None:
    place.prepare("model.image_size=18")


@case("config: reduction.group_size = ...: does not divide the model's ... blocks; allowed: ...")
def _(place: Place) -> None:
    place.prepare("model.kwargs.depth=4", "reduction.group_size=3")


@case("weights ...: no such file")
def _(place: Place) -> None:
    place.prepare("model.initial_weights=vit.pth")


@case("weights ...: cannot be read (...)")
def _(place: Place) -> None:
    Path("vit.pth").write_bytes(b"<html>")
    place.prepare("model.initial_weights=vit.pth")


@case("weights ...: lacks ... of this model...")
def _(place: Place) -> None:
    place.prepare(place.weights(), "model.kwargs.depth=4")


@case("weights ...: does not fit in the shape of ... of this model...")
def _(place: Place) -> None:
    place.prepare(place.weights(), "model.kwargs.embed_dim=48")


@case("weights ...: have a classifier of ... classes, but model.num_classes = ...")
def _(place: Place) -> None:
    prepare_evaluation(place.config(place.weights(), "model.num_classes=12"))


@case("weights ...: made with reduction ..., which has another structure than ...")
def _(place: Place) -> None:
    config = place.config()
    model = build_model(config.model, config.reduction, seed=0)
    write_weights(
        Path("grouped.safetensors"),
        canonical_state(model),
        model=config.model,
        reduction=config.reduction,
        tied=tied_names(model),
    )
    place.prepare("model.initial_weights=grouped.safetensors", "reduction.strategy=none")


@case("config: reduction.strategy = ...: the weights are reduced so already; name another")
def _(place: Place) -> None:
    place.weights()
    main(["reduce", "weights.pth", "--to", "x.safetensors", "--config", "quickstart", *TINY, "reduction.strategy=none"])


@case("config: optimizer.frozen = ...: names no parameter of this model; nearest: ...")
def _(place: Place) -> None:
    place.prepare('optimizer.frozen=["blocks.9"]')


# --- runs and checkpoints ---------------------------------------------------------------------------------


@case("run folder ...: its results depend on settings that have changed (...): ...")
def _(place: Place) -> None:
    place.checkpoint()
    place.resume("optimizer.lr=0.5")


@case("run folder ...: was made with another model (...): choose another name, or remove it")
def _(place: Place) -> None:
    place.checkpoint("model.image_size=32")
    place.resume()


@case("checkpoint ...: the samples would come in another order (...): ...")
def _(place: Place) -> None:
    check_fingerprint({"samples": 10}, {"samples": 12}, "checkpoint step-00000004", DATA_KEYS)


@case("train.resume = true, but ... holds no checkpoint")
def _(place: Place) -> None:
    place.resume("train.resume=true")


@case("train.resume = false, but ... holds the checkpoints of a run: choose another name, or remove it")
def _(place: Place) -> None:
    place.checkpoint()
    place.resume("train.resume=false")


@case("...: another run is using it; wait for its end, or choose another name")
def _(place: Place) -> None:
    with lock(place.folder / "checkpoints"):
        lock(place.folder / "checkpoints")


@case("run folder ...: cannot be written (...)")
def _(place: Place) -> None:
    Path("runs").touch()
    RunFolder(Path("runs/photos"), writes=True).write_summary({})


@case("warning: checkpoint ...: ...; renamed to damaged-...")
def _(place: Place) -> str:
    with pytest.raises(UserError):
        newest_intact([place.damaged_checkpoint()], ALONE)
    return place.capsys.readouterr().err.strip()


@case("...: every checkpoint is damaged; remove ... to start again")
def _(place: Place) -> None:
    newest_intact([place.damaged_checkpoint()], ALONE)


@case("training diverged: no finite gradient in ... steps up to step ...")
def _(place: Place) -> None:
    check = DivergenceCheck()
    for step in range(100):
        check.add(StepResult(float("inf"), True), step=step)


@case("out of memory with ... images per forward pass: ...")
def _(place: Place) -> None:
    with naming_out_of_memory(256, TRAINING_KNOBS):
        raise torch.OutOfMemoryError


@case("config: tracking.wandb.mode = ...: wandb cannot start a run (...); offline, or WANDB_MODE=... no network")
def _(place: Place) -> None:
    wandb = pytest.importorskip("wandb")

    def init(**settings: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    place.patch.setattr(wandb, "init", init)
    config = place.config("tracking.wandb.enabled=true").model_dump(mode="json")
    tracking = Tracking(place.config("tracking.wandb.enabled=true").tracking.enabled)
    with naming_settings(TRACKER_KEYS):
        tracking.open(RunInfo("photos", place.folder, config, 0), {})


@case("run folder ...: has none of best_ema.safetensors, ...")
def _(place: Place) -> None:
    Path("runs").mkdir()
    main(["evaluate", "runs"])


@case("...: there is no config.json beside it: give --config")
def _(place: Place) -> None:
    place.weights()
    main(["evaluate", "weights.pth"])


# --- GPUs and launchers -----------------------------------------------------------------------------------


@case("--ranks all: this machine has no GPU; name a number")
def _(place: Place) -> None:
    place.patch.setattr(torch.cuda, "device_count", lambda: 0)
    main(["train", "--config", "quickstart", "--ranks", "all"])


@case("--ranks starts processes, but a launcher has started this one already: leave it out")
def _(place: Place) -> None:
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        place.patch.setenv(key, value)
    main(["train", "--config", "quickstart", "--ranks", "2"])


@case("local rank ... has no GPU: this node shows ...; start at most one rank per GPU")
def _(place: Place) -> None:
    place.patch.setattr(torch.cuda, "is_available", lambda: True)
    place.patch.setattr(torch.cuda, "device_count", lambda: 2)
    for key, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        place.patch.setenv(key, value)
    World.from_environment()


@case("config: train.global_batch = ...: must be at least the ... ranks")
def _(place: Place) -> None:
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "9"}.items():
        place.patch.setenv(key, value)
    place.prepare()


@case("... says 1 ranks, but srun started 8 processes: unset the variables of one of them (...)")
def _(place: Place) -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    find_launch({**slurm, "SLURM_JOB_NODELIST": "n1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})


@case("... is set, but ... is not: start with torchrun, deepspeed, srun or mpirun, or unset it")
def _(place: Place) -> None:
    find_launch({"RANK": "0"})


@case("config: kernels.mlp = ...: ...: use 'auto' or 'eager'")
def _(place: Place) -> None:
    place.prepare("kernels.mlp=triton")
