"""Cases of tests/test_troubleshooting.py: messages about models, runs, checkpoints and launchers."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from message_case import TINY, Place, case
from scalevit.checkpoint.folder import lock
from scalevit.checkpoint.restore import newest_intact
from scalevit.cli.main import main
from scalevit.config.model import ModelConfig
from scalevit.data.loading.train_loader import check_fingerprint
from scalevit.distributed import World
from scalevit.errors import UserError, naming_settings
from scalevit.export.source import find_source
from scalevit.export.timm_model import as_timm_model
from scalevit.export.trained_model import read_model
from scalevit.files import locked
from scalevit.launchers import find_launch
from scalevit.models.api import create_model
from scalevit.models.build import build_model
from scalevit.models.mlps import NoMlp
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.weights.write import write_weights
from scalevit.reports.sweeps.plan import make_plan
from scalevit.reports.sweeps.record import write_record
from scalevit.runs.folder import RunFolder
from scalevit.runs.trackers.base import RunInfo
from scalevit.runs.tracking import Tracking
from scalevit.training.micro_batch import TRAINING_KNOBS, naming_out_of_memory
from scalevit.training.setting_keys import DATA_KEYS, TRACKER_KEYS
from scalevit.training.step import DivergenceCheck, StepResult
from scalevit.tying import canonical_state, tied_names

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))

# --- models ----------------------------------------------------------------------------------------------


@case("config: model.name = ...: is not a timm model; nearest: ...")
def _(place: Place) -> None:
    place.prepare("model.name=vit_smal_patch16_224")


@case("config: model.name = ...: has batch norms, ...")
def _(place: Place) -> None:
    place.prepare("model.name=resnet18", "model.kwargs={}", "reduction.strategy=none")


@case("model ... cannot be reduced: block ... has ..., needs timm's Mlp, GluMlp or SwiGLU")
def _(place: Place) -> None:
    place.prepare("model.name=vit_base_patch16_xp_224")


@case("model ...: blocks ... and ... cannot share their MLPs, whose shapes are ...: name groups of equal blocks")
def _(place: Place) -> None:
    create_model("swin_tiny_patch4_window7_224", "grouped", group_size=4)


@case("config: model.name = ...: timm knows no weights of ... with this tag; nearest: ...")
def _(place: Place) -> None:
    place.prepare("model.name=vit_base_patch16_224.mea")


@case("config: model.image_size = ...: is not a multiple of the patch size ...")
def _(place: Place) -> None:
    place.prepare("model.image_size=18")


@case("config: reduction.group_size = ...: does not divide the model's ... blocks; allowed: ...")
def _(place: Place) -> None:
    place.prepare("model.kwargs.depth=4", "reduction.group_size=3")


@case("config: task.teacher.name = ...: name a model of timm, or a file in task.teacher.weights")
def _(place: Place) -> None:
    place.prepare("task.name=distillation")


@case("config: task.teacher = ...: has ... classes, but model.num_classes = ... (...)")
def _(place: Place) -> None:
    place.prepare("task.name=distillation", "task.teacher.name=vit_tiny_patch16_224")


@case("config: task.teacher.weights = ...: does not say of which model it is: name it in task.teacher.name")
def _(place: Place) -> None:
    place.weights()
    place.prepare("task.name=distillation", "task.teacher.weights=weights.pth")


@case("config: task.teacher.weights = ...: a folder without a config.json of timm, which names the architecture...")
def _(place: Place) -> None:
    place.prepare("task.name=distillation", "task.teacher.weights=shards")


@case("config: task.teacher.name = ...: ... lacks ... of this model: set task.teacher.kwargs for its model")
def _(place: Place) -> None:
    place.weights()
    named = ["task.teacher.name=vit_tiny_patch16_224", "task.teacher.weights=weights.pth"]
    place.prepare("task.name=distillation", *named)


@case('config: task.method = "token": needs a model with a distillation token (deit_*_distilled_*), not ...')
def _(place: Place) -> None:
    teacher = ["task.teacher.name=deit_tiny_patch16_224", "task.teacher.pretrained=false"]
    classes = ["task.teacher.kwargs.num_classes=10", "task.method=token"]
    place.prepare("task.name=distillation", *teacher, *classes)


@case("config: task.widths = ...: ... hidden units are ..., not a multiple of 16: use ...")
def _(place: Place) -> None:
    place.prepare("task.name=nested_width", "task.widths=[0.3,1.0]")


def reduce(place: Place, *settings: str) -> None:
    place.weights()
    main(["reduce", "weights.pth", "--to", "x.safetensors", "--config", "quickstart", *TINY, *settings])


@case("config: reduction.strategy = ...: give reduction.strategy=grouped, shallow or thin")
def _(place: Place) -> None:
    reduce(place, "reduction.strategy=none")


@case("config: reduction.strategy = ...: the weights are reduced so already: ...")
def _(place: Place) -> None:
    grouped("a.safetensors")
    main(["reduce", "a.safetensors", "--to", "x.safetensors", "--config", "a.json"])


@case("config: reduction.strategy = ...: cannot be combined with ..., which the weights are: name one that has both")
def _(place: Place) -> None:
    grouped("a.safetensors")
    some = ["reduction.strategy=shallow", "reduction.blocks=[0]"]
    main(["reduce", "a.safetensors", "--to", "x.safetensors", "--config", "a.json", *some])


@case("--choose-... sets ..., and ... is given too: leave out one of the two")
def _(place: Place) -> None:
    reduce(place, "reduction.strategy=grouped", "reduction.group_size=2", "--choose-pairs", "1")


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


@case("sweep folder ...: was made with other settings (...): undo that, choose another --name, or remove the folder")
def _(place: Place) -> None:
    write_record(make_plan("quickstart", [], [], [1]))
    write_record(make_plan("quickstart", ["optimizer.lr=1"], [], [2]))


@case("sweep folder ...: another sweep is using it; wait for its end")
def _(place: Place) -> None:
    Path("runs/x/seed1").mkdir(parents=True)
    for name in ("config.json", "summary.json"):
        Path("runs/x/seed1", name).write_text('{"top1": 50}')
    with locked(Path("runs/x/.lock")):
        main(["sweep", "--config", "quickstart", "--seeds", "1", "--name", "x"])


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


# --- exports ----------------------------------------------------------------------------------------------


def grouped(*names: str, **changes: Any) -> Any:
    """Weights files of a grouped model of two blocks, and the model."""
    model = ModelConfig(
        name="vit_tiny_patch16_224", image_size=16, kwargs={"patch_size": 8, "depth": 2, "embed_dim": 24, **changes}
    )
    network = build_model(model, GroupedReduction(), seed=0)
    for name in names:
        about = {"model": model, "reduction": GroupedReduction(), "tied": tied_names(network)}
        write_weights(Path(name), canonical_state(network), **about)
        settings = {"model": model.model_dump(mode="json"), "reduction": {"strategy": "grouped"}}
        Path(name).with_suffix(".json").write_text(json.dumps(settings))
    return network


@case("...: already exists; choose another name")
def _(place: Place) -> None:
    grouped("a.safetensors", "b.safetensors")
    main(["export", "a.safetensors", "b.safetensors", "--to", "timm"])


@case("model ...: timm cannot build it as it was reduced, with any mlp_ratio (...); ...")
def _(place: Place) -> None:
    grouped("a.safetensors")
    network, description = read_model(find_source("a.safetensors", config_required=False))
    network.blocks[0].mlp = NoMlp()
    as_timm_model(network, description)


@case("export ...: contains more than tensors and operations and was not loaded (...)")
def _(place: Place) -> None:
    with zipfile.ZipFile("x.pt2", "w") as archive:
        for name, content in {"archive_format": "pt2", "version": "3\n", "code.py": ""}.items():
            archive.writestr(f"x/{name}", content)
    main(["predict", "x.pt2", "x.pt2"])


@case("export ...: cannot be read (...)")
def _(place: Place) -> None:
    grouped("a.safetensors")
    main(["export", "a.safetensors", "x", "--to", "huggingface"])
    config = Path("x/config.json")
    config.write_text(config.read_text().replace('"num_classes": 1000', '"num_classes": 12', 1))
    main(["predict", "x", "x/README.md"])


@case("...: is a file, not a folder")
def _(place: Place) -> None:
    place.weights()
    main(["analyze", "weights.pth", "--config", "quickstart", "--output", "weights.pth"])


@case("...: is an export (--to ...): name the run or its weights")
def _(place: Place) -> None:
    grouped("a.safetensors")
    main(["export", "a.safetensors", "b.safetensors", "--to", "timm"])
    main(["reduce", "b.safetensors", "--to", "c.safetensors", "reduction.strategy=shallow"])


@case("...: is not of the structure of ...: ...")
def _(place: Place) -> None:
    grouped("a.safetensors")
    grouped("b.safetensors", num_heads=2)
    main(["average", "a.safetensors", "b.safetensors", "--output", "c.safetensors", "--no-evaluation"])


# --- GPUs and launchers -----------------------------------------------------------------------------------


@case("--ranks all: this machine has no GPU; name a number")
def _(place: Place) -> None:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # which a run in this process has left
        place.patch.delenv(key, raising=False)
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
