"""Every message in docs/troubleshooting.md is printed by the code: each row has a case here, and each case a row.

`...` in a documented message stands for any text. A case ends with the message as a `UserError`, or returns what it
printed on standard error.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scalevit.checkpoint.folder import digest, lock
from scalevit.checkpoint.restore import newest_intact
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.data.builtin import digits as digit_samples
from scalevit.data.faults import Fault, FaultLog
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.train_loader import check_fingerprint
from scalevit.data.shards.index import load_index
from scalevit.data.writing.writer import write_samples
from scalevit.distributed import World
from scalevit.errors import UserError, naming_settings, require
from scalevit.launchers import find_launch
from scalevit.models.api import create_model
from scalevit.models.build import build_model
from scalevit.models.weights.write import write_weights
from scalevit.runs.folder import RunFolder
from scalevit.runs.trackers.base import RunInfo
from scalevit.runs.tracking import Tracking
from scalevit.training.micro_batch import TRAINING_KNOBS, naming_out_of_memory
from scalevit.training.resume import find_resumable
from scalevit.training.run import prepare, prepare_evaluation
from scalevit.training.setting_keys import DATA_KEYS, TRACKER_KEYS
from scalevit.training.step import DivergenceCheck, StepResult
from scalevit.tying import canonical_state, tied_names

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
SECTION = "Messages of scalevit"
ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
TINY = ["data.workers=0", "model.kwargs.depth=2", "model.kwargs.embed_dim=24", "train.global_batch=8"]


@dataclass(frozen=True)
class Place:
    """Where a case runs: an empty current folder, and two classes of digits as shards (`train`, `validation`)."""

    folder: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def config(self, *settings: str) -> Any:
        data = [f"data.{part}={self.folder}/shards/{part}" for part in ("train", "validation")]
        return load_config("quickstart", [*TINY, "data.builtin=null", *data, *settings])

    def prepare(self, *settings: str) -> None:
        prepare(self.config(*settings))

    def images(self, content: bytes | None = None) -> None:
        """A folder of images with one class: an image, or what `content` says."""
        path = self.folder / "photos" / "cat" / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
        if content is not None:
            path.write_bytes(content)

    def write_shards(self, *options: str) -> None:
        main(["shards", "write", "--source", "photos", "--destination", "out", "--workers", "0", *options])

    def checkpoint(self, *settings: str) -> Path:
        """The record of a checkpoint of a run with these settings, without tensors."""
        folder = RunFolder(Path(self.config().output_dir) / self.config().name, writes=True).checkpoints
        checkpoint = folder / "step-00000004"
        checkpoint.mkdir(parents=True)
        empty: dict[str, Any] = {key: {} for key in ("state", "optimizer", "loss_scale", "tensors", "tied", "versions")}
        other = {"format": 2, "score": None, "data": None, "parts": [], "world_size": 1}
        record = {**empty, **other, "config": self.config(*settings).model_dump(mode="json")}
        (checkpoint / "state.json").write_text(json.dumps(record))
        manifest = {"files": {"state.json": digest(checkpoint / "state.json")}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        return checkpoint

    def damaged_checkpoint(self) -> Path:
        checkpoint = self.checkpoint()
        (checkpoint / "state.json").write_text("{")
        return checkpoint

    def resume(self, *settings: str) -> None:
        config = self.config(*settings)
        find_resumable(config, RunFolder(Path(config.output_dir) / config.name, writes=True))

    def weights(self, **changes: Any) -> str:
        """A plain state dict of the tiny model."""
        model = self.config().model.model_copy(update=changes)
        torch.save(build_model(model, load_config(None, []).reduction, seed=0).state_dict(), "weights.pth")
        return "model.initial_weights=weights.pth"


Case = Callable[[Place], str | None]
CASES: dict[str, Case] = {}


def case(message: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        assert message not in CASES
        CASES[message] = function
        return function

    return add


# --- settings and commands --------------------------------------------------------------------------------


@case("config: unknown key ...; nearest: ...")
def _(place: Place) -> None:
    place.prepare("train.epoch=3")


@case("config: ... was renamed to ...")
def _(place: Place) -> None:
    place.prepare("data.embedded=digits")


@case("config: ... = ...: must be ...")
def _(place: Place) -> None:
    place.prepare("train.precision=float16")


@case("config ...: no such file or preset; nearest: ... (presets: ...)")
def _(place: Place) -> None:
    load_config("grouqed")


@case("config ...: not valid JSON (...)")
def _(place: Place) -> None:
    Path("my.json").write_text('{"name": "photos",}')
    load_config("my.json")


@case("override ...: must have the form key.sub=value")
def _(place: Place) -> None:
    place.prepare("train.epochs")


@case("the package ... is not installed; install the extra: ...")
def _(place: Place) -> None:
    require("package_that_nobody_has", extra="wandb")


# --- data -------------------------------------------------------------------------------------------------


@case("no shards at ...: create them with `scalevit shards write ...`")
def _(place: Place) -> None:
    place.prepare("data.train=data/nowhere")


@case("shards at ...: ... of ... are missing, first ...")
def _(place: Place) -> None:
    (place.folder / "shards" / "train" / "shard-000001.tar").unlink()
    place.prepare()


@case("shard ...: truncated ...")
def _(place: Place) -> None:
    shard = place.folder / "shards" / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    place.prepare()


@case("config: model.num_classes = ...: ... label ... is not in ...")
def _(place: Place) -> None:
    place.prepare("model.num_classes=1")


@case("shards at ...: class ... is not among the ... classes of the training set...")
def _(place: Place) -> None:
    write_samples(digit_samples()["validation"][:4], "other", classes=[f"new {number}" for number in range(10)])
    place.prepare("data.validation=other")


@case("config: train.global_batch = ...: must be at most the ... training images")
def _(place: Place) -> None:
    place.prepare("train.global_batch=64")


@case("shard ...: changed since it was indexed; start again")
def _(place: Place) -> None:
    index = load_index("shards/train")
    Path(index.shards[0].path).touch()
    ShardDataset(index, lambda image: image).image(0)


@case("config: data.max_faults = ...: found ... bad samples (last: ...): fix the shards or raise the limit")
def _(place: Place) -> None:
    with naming_settings({"limit": "data.max_faults"}):
        FaultLog(Path("data_faults.jsonl"), limit=0).add([Fault("shard-000000.tar", "n1", 512, "not an image")])


@case("...: the image's bytes have changed (wrong checksum)")
def _(place: Place) -> str:
    index = load_index("shards/train")
    shard = Path(index.shards[0].path)
    content = bytearray(shard.read_bytes())
    content[int(index.offset[0]) + 20] ^= 1
    shard.write_bytes(content)
    fault = ShardDataset(load_index("shards/train"), lambda image: image).image(0)
    assert isinstance(fault, Fault)
    return str(fault)


# --- writing shards ---------------------------------------------------------------------------------------


@case("images at ...: no such folder; ...")
def _(place: Place) -> None:
    place.write_shards()


@case("images at ...: no images in subfolders; ...")
def _(place: Place) -> None:
    (place.folder / "photos").mkdir()
    (place.folder / "photos" / "cat.jpg").touch()
    place.write_shards()


@case("image ...: cannot be decoded (...); replace or remove it")
def _(place: Place) -> None:
    place.images(b"no image")
    place.write_shards()


@case("shards at ...: none of the ... images can be used; ...")
def _(place: Place) -> None:
    place.images(b"no image")
    place.write_shards("--max-faults", "1")


@case("--max-faults = ...: found ... bad images ...: replace or remove them, or raise the limit")
def _(place: Place) -> None:
    place.images(b"no image")
    (place.folder / "photos" / "cat" / "1.png").write_bytes(b"no image")
    place.write_shards("--max-faults", "1")


@case("--image-column = ...: ... has the columns ...")
def _(place: Place) -> None:
    Path("list.csv").write_text("file,label\n0.png,cat\n")
    main(["shards", "write", "--table", "list.csv", "--destination", "out"])


@case("shards at ...: not an empty folder; remove it or name another destination")
def _(place: Place) -> None:
    place.images()
    place.write_shards()
    place.write_shards()


@case("shards at ...: were started with other settings (...): remove that folder to start again")
def _(place: Place) -> None:
    place.images(b"no image")
    with pytest.raises(SystemExit):
        place.write_shards()  # leaves out.partial
    place.write_shards("--seed", "7")


@case("class ... is not in the file of class names...")
def _(place: Place) -> None:
    place.images()
    Path("names.txt").write_text("dog\nowl\n")
    place.write_shards("--class-names", "names.txt")


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


@case("config: tracking.wandb.mode = ...: wandb cannot start a run (...); offline needs no network")
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


# --- the page ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for part, samples in digit_samples().items():
        few = [sample for sample in samples if sample[3] < 2][:24]
        write_samples(few, folder / part, shard_size=12, classes=[str(digit) for digit in range(10)])
    return folder


@pytest.fixture
def place(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, tmp_path / "shards")
    return Place(tmp_path, monkeypatch, capsys)


def produced(run: Case, place: Place) -> str:
    """The message of a case, as a user sees it after `error: `."""
    try:
        shown = run(place)
    except UserError as error:
        shown = str(error)
    except SystemExit:
        shown = place.capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")
    assert shown is not None, "the case ended without a message"
    return shown


@pytest.mark.parametrize("message", CASES)
def test_the_message_is_printed(message: str, place: Place) -> None:
    shown = produced(CASES[message], place)
    assert "\n" not in shown
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, shown), shown


def test_every_documented_message_has_a_case_and_every_case_a_row() -> None:
    (section,) = re.findall(rf"^## {SECTION}\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    cells = [line.removeprefix("| ").split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    # Code that has backticks itself is enclosed by two.
    found = [re.fullmatch(r"(?:`` (.*) ``|`([^`]*)`)", cell) for cell in cells if cell != "Message"]
    assert all(found), "the first cell of a row is one message in backticks"
    messages = [match[1] or match[2] for match in found if match]
    assert sorted(messages) == sorted(CASES)
