"""Checkpoint folders in one process: whole or absent, damage of every kind found, faults of the disk in one line."""

import json
import os
import pickle
import re
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import scalevit
from scalevit.checkpoint.folder import digest, find_damage, list_checkpoints, list_resumable, read_record
from scalevit.checkpoint.restore import newest_intact, restore
from scalevit.checkpoint.run_state import RunState
from scalevit.checkpoint.saver import Saver
from scalevit.checkpoint.tensors import read_slices, write_slices
from scalevit.config.training import CheckpointConfig, EmaConfig
from scalevit.distributed import World
from scalevit.engines.precision import LossScale
from scalevit.engines.state import OptimizerState, StateTensor, TensorSlice
from scalevit.errors import UserError
from scalevit.training.ema import Ema
from scalevit.training.optimizers import state_tensors

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))


class OneRank:
    """As much of an engine as saving and loading need, without a process group."""

    world = ALONE

    def __init__(self, value: float, name: str = "w"):
        self.weights = {name: torch.full((2, 3), value)}
        self.optimizer = torch.optim.AdamW([torch.zeros(1)])
        self.steps = 4
        self.loss_scale = LossScale()
        self.tied = {"again": name}
        self.kept = {key: torch.full((2, 3), value + number) for number, key in enumerate(("exp_avg", "exp_avg_sq"))}

    def local_parameters(self) -> dict[str, Tensor]:
        return self.weights

    def slices(self, local: dict[str, Tensor]) -> dict[str, TensorSlice]:
        return {name: TensorSlice(tensor.view(-1), 0, tensor.shape) for name, tensor in local.items()}

    def optimizer_state_layout(self, tensors: dict[str, StateTensor]) -> dict[str, dict[str, TensorSlice]]:
        assert all(kept.dtype == torch.float32 for kept in tensors.values())
        return {key: {name: own.empty_like() for name, own in self.slices(self.weights).items()} for key in tensors}

    def optimizer_state(self) -> OptimizerState:
        (name,) = self.weights
        tensors = {key: self.slices({name: kept}) for key, kept in self.kept.items()}
        return OptimizerState("AdamW", tensors, {"step": {name: torch.tensor(float(self.steps))}})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        (name,) = self.weights
        self.steps = int(state.scalars["step"][name])
        self.kept = {key: slices[name].values.view(2, 3) for key, slices in state.tensors.items()}

    def commit_parameters(self) -> None:
        pass


def save(folder: Path, *steps: int, scores: dict[int, float] | None = None, **settings: Any) -> None:
    saver = Saver(folder, ALONE, CheckpointConfig(**settings))
    for step in steps:
        saver.save(
            OneRank(float(step)), None, RunState(step=step), {"config": {}, "data": {}}, (scores or {}).get(step)
        )
    saver.wait()


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_saved_and_loaded_and_only_the_newest_kept(tmp_path: Path, asynchronous: bool) -> None:
    save(tmp_path, 5, 10, 100, keep=2, asynchronous=asynchronous)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    assert (tmp_path / "latest").read_text() == "step-00000100\n"
    assert not (tmp_path / "best").exists()
    engine = OneRank(0.0)
    ema = Ema(engine.weights, EmaConfig(decay=0.9))
    state = restore(newest_intact(list_checkpoints(tmp_path)[::-1], ALONE), engine, ema.tensors)
    assert (state.step, engine.steps) == (100, 4)
    assert torch.equal(engine.weights["w"], torch.full((2, 3), 100.0))
    assert torch.equal(engine.kept["exp_avg_sq"], torch.full((2, 3), 101.0))
    assert torch.equal(ema.tensors["w"], engine.weights["w"]), "an EMA that is new starts at the weights"


def test_what_is_saved_is_the_state_at_that_moment(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, CheckpointConfig())
    engine, state = OneRank(1.0), RunState(step=1)
    saver.save(engine, None, state, {"config": {}, "data": {}}, None)
    engine.weights["w"].fill_(9.0)
    state.epochs.append({"later": True})
    saver.wait()
    fresh = OneRank(0.0)
    assert restore(tmp_path / "step-00000001", fresh, None).epochs == []
    assert torch.equal(fresh.weights["w"], torch.full((2, 3), 1.0))


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    scores = {1: 50.0, 2: 80.0, 3: 80.0, 4: 70.0}
    save(tmp_path, 1, 2, 3, 4, 5, scores=scores, keep=1)
    assert names(tmp_path) == ["step-00000003", "step-00000005"]
    assert (tmp_path / "best").read_text() == "step-00000003\n"
    save(tmp_path, 6, keep=1, keep_best=False)
    assert names(tmp_path) == ["step-00000006"]


def test_what_a_killed_run_was_doing_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for name in (".step-00000007.tmp", ".step-00000004.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "step-00000005").rename(tmp_path / ".step-00000005.old")  # killed while it was being replaced
    save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "latest", "step-00000005"]
    assert find_damage(tmp_path / "step-00000005") == []


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Attack:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGES = {
    "one flipped bit of a tensor": lambda folder: flip_a_bit(folder / SHARD),
    "a truncated file": lambda folder: os.truncate(folder / SHARD, 100),
    "an empty file": lambda folder: os.truncate(folder / SHARD, 0),
    "a missing file": lambda folder: (folder / SHARD).unlink(),
    "one flipped bit of the state": lambda folder: flip_a_bit(folder / "state.json"),
    "an altered state": lambda folder: (folder / "state.json").write_text('{"format": 2}'),
    "one flipped bit of the manifest": lambda folder: flip_a_bit(folder / "manifest.json"),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('{"files": [1]}'),
    "tensors that were added": lambda folder: (folder / "extra.safetensors").write_bytes((folder / SHARD).read_bytes()),
    "a pickle as the tensors": lambda folder: (folder / SHARD).write_bytes(
        pickle.dumps(Attack(folder.parent / "trace"))
    ),
    "a pickle as torch's metadata": lambda folder: (folder / ".metadata").write_bytes(
        pickle.dumps(Attack(folder.parent / "trace"))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_and_the_one_before_is_taken(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 5, 6)
    damage(tmp_path / "step-00000006")
    assert find_damage(tmp_path / "step-00000006")
    found = newest_intact(list_checkpoints(tmp_path)[::-1], ALONE)
    assert found.name == "step-00000005"
    warning = capsys.readouterr().err
    assert re.fullmatch(r"warning: checkpoint \S+step-00000006: .+; renamed to damaged-step-00000006\n", warning)
    assert (tmp_path / "damaged-step-00000006").is_dir(), "nothing is lost"
    assert not (tmp_path / "trace").exists(), "nothing was executed"
    damage(found)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_intact([found], ALONE)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In every file, everywhere in steps of 97 bits (a prime, so that all bits of a byte come up)."""
    save(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    for path in folder.iterdir():
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 97):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            changed_meaning = path.name != "manifest.json" or _read(content) != _read(whole)
            assert bool(find_damage(folder)) == changed_meaning, (path.name, bit)
        path.write_bytes(whole)
    assert find_damage(folder) == []


def _read(content: bytes) -> Any:
    """What a manifest says of files; spaces and its format number say nothing about them."""
    try:
        return json.loads(content)["files"]
    except (ValueError, KeyError):
        return None


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(UserError, match=r"belongs to another model \(v is not there, \[2, 3\] here\)"):
        restore(tmp_path / "step-00000005", OneRank(0.0, name="v"), None)


STATE = {"step": 5, "seconds": 0.0, "timed_images": 0, "epochs": [], "changes": [], "trackers": {}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": {**STATE, "later": 1}}, "later is unknown"),
        ({"state": {key: value for key, value in STATE.items() if key != "seconds"}}, "seconds is missing"),
        ({"state": {**STATE, "step": "5"}}, "step is str"),
        ({"state": {**STATE, "epochs": {}}}, "epochs is dict"),
        ({"optimizer": {"name": "AdamW", "tensors": {"exp_avg": {"dtype": "load", "shapes": None}}}}, "load is not"),
        ({"optimizer": {"name": "AdamW", "tensors": {}, "scalars": [{"name": "step"}]}}, "value"),
        ({"loss_scale": {"value": 1.0}}, "grown_steps"),
    ],
)
def test_a_state_of_another_version_is_refused_in_one_line(tmp_path: Path, changes: Any, reason: str) -> None:
    save(tmp_path, 5)
    rewrite_state(tmp_path / "step-00000005", **changes)
    engine = OneRank(0.0)
    with pytest.raises(UserError, match=f"was written by another version of scalevit .*{reason}") as refused:
        restore(tmp_path / "step-00000005", engine, None)
    assert "\n" not in str(refused.value)
    assert not engine.weights["w"].any(), "nothing was loaded"


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    engine = OneRank(0.0)
    engine.optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(UserError, match="contains the state of optimizer AdamW, this run uses SGD"):
        restore(tmp_path / "step-00000005", engine, None)


def test_an_optimizer_that_keeps_more_than_the_checkpoint_has_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    restore(tmp_path / "step-00000005", OneRank(0.0), None, kept=["exp_avg_sq"])
    with pytest.raises(UserError, match=r"contains no max_exp_avg_sq, which this run.s AdamW keeps"):
        restore(tmp_path / "step-00000005", OneRank(0.0), None, kept=state_tensors("adamw", {"amsgrad": True}))


def test_packages_that_are_not_installed_have_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("scalevit.runs.environment.version", nothing_is_installed)
    save(tmp_path, 5)
    assert read_record(tmp_path / "step-00000005")["versions"] == {"scalevit": scalevit.__version__}


def test_torchs_own_reader_reads_the_tensors(tmp_path: Path) -> None:
    save(tmp_path, 5)
    target = {"weights.w": torch.zeros(6), "optimizer.exp_avg_sq.w": torch.zeros(6)}
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-00000005")), no_dist=True)
    assert torch.equal(target["weights.w"], torch.full((6,), 5.0))
    assert torch.equal(target["optimizer.exp_avg_sq.w"], torch.full((6,), 6.0))


def test_slices_of_any_cut_and_type_are_read(tmp_path: Path) -> None:
    values = {"a": torch.arange(10.0), "b": torch.arange(7, dtype=torch.bfloat16), "c": torch.arange(5)}
    for rank, cut in enumerate((slice(0, 3), slice(3, 4), slice(4, None))):
        parts = {key: TensorSlice(v[cut], cut.start, v.shape) for key, v in values.items()}
        write_slices(tmp_path, parts, rank=rank)
    write_slices(tmp_path, {"a": TensorSlice(torch.empty(0), 10, torch.Size([10]))}, rank=3)
    assert len(list(tmp_path.iterdir())) == 3, "a rank that holds nothing writes no file"
    for start, stop in ((0, 10), (2, 5), (3, 4), (9, 10)):
        read = {k: TensorSlice(torch.empty_like(v[start:stop]), start, v.shape) for k, v in values.items()}
        read_slices(tmp_path, read)
        for key, part in read.items():
            assert torch.equal(part.values, values[key][start:stop]), (key, start)
    with pytest.raises(UserError, match="a is not complete"):
        read_slices(tmp_path, {"a": TensorSlice(torch.empty(4), 8, torch.Size([12]))})


def test_another_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for change, reason in (
        ({"format": 99}, "format 99, this version of scalevit reads format 2"),
        ({"format": 2, "config": None}, "config is NoneType"),
    ):
        rewrite_state(tmp_path / "step-00000005", **change)
        with pytest.raises(UserError, match=reason):
            restore(tmp_path / "step-00000005", OneRank(0.0), None)


def rewrite_state(checkpoint: Path, **changes: Any) -> None:
    """As if it had been written so: the checksum agrees."""
    state, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **changes}))
    content = json.loads(manifest.read_text())
    content["files"]["state.json"] = digest(state)
    manifest.write_text(json.dumps(content))


def test_a_state_with_a_flipped_bit_is_never_believed(tmp_path: Path) -> None:
    """A run compares its config with it before it checks the tensors."""
    save(tmp_path, 5)
    path = tmp_path / "step-00000005" / "state.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.json cannot be read"):
            read_record(path.parent)


def test_a_damaged_one_does_not_keep_others_from_being_saved(tmp_path: Path) -> None:
    save(tmp_path, 5, scores={5: 90.0})
    (tmp_path / "step-00000005" / "state.json").write_text("{}")
    save(tmp_path, 6, 7)
    assert names(tmp_path) == ["step-00000006", "step-00000007"]


def test_a_lost_manifest_is_damage_and_no_new_start(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-00000005" / "manifest.json").unlink()
    (found,) = list_resumable(tmp_path)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_intact([found], ALONE)
    with pytest.raises(UserError, match="its checkpoints are damaged or gone"):
        list_resumable(tmp_path)


def test_what_a_user_puts_there_stays(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for name in ("step-00000005-good", "step-zgood"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    save(tmp_path, 6, 7, 8, keep=1)
    assert names(tmp_path) == ["step-00000008"]
    assert (tmp_path / "latest").read_text() == "step-00000008\n"
    assert (tmp_path / "step-00000005-good" / "state.json").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, CheckpointConfig())
    other = os.fork()
    if other == 0:
        try:
            Saver(tmp_path, ALONE, CheckpointConfig())
        except UserError as error:
            os._exit(7 if "another run is using it" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7
    saver.wait()


def test_a_place_that_cannot_be_written_is_one_line_and_the_old_stay(tmp_path: Path) -> None:
    save(tmp_path, 5)
    saver = Saver(tmp_path, ALONE, CheckpointConfig())
    (tmp_path / ".step-00000006.tmp").write_text("a file where the folder should go")
    saver.save(OneRank(6.0), None, RunState(step=6), {"config": {}, "data": {}}, None)
    with pytest.raises(UserError, match="cannot be written"):
        saver.wait()
    assert not saver.failed
    assert names(tmp_path) == ["step-00000005"]
    assert find_damage(tmp_path / "step-00000005") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_is_one_line_and_the_old_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    # The tensors' file goes to a device that is always full, as a disk may be by then.
    full = Path("/dev/full")
    monkeypatch.setattr("scalevit.checkpoint.tensors.open", lambda *_: full.open("wb"), raising=False)
    saver = Saver(tmp_path, ALONE, CheckpointConfig())
    saver.save(OneRank(6.0), None, RunState(step=6), {"config": {}, "data": {}}, None)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        saver.wait()
    assert names(tmp_path) == ["step-00000005"]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "latest", "step-00000005"}, "the half is removed"
