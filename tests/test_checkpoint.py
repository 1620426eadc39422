"""Checkpoint folders: whole or absent, and told from damaged ones in one line."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scalevit import checkpoint
from scalevit.engines import OptimizerState
from scalevit.engines.base import LossScale
from scalevit.errors import UserError


class OneRank:
    """As much of an engine as saving and loading need, without a process group."""

    class world:
        is_first = True

        @staticmethod
        def agreeing_on_errors() -> nullcontext[None]:
            return nullcontext()

    def __init__(self, value: float):
        self.weights = {"w": torch.full((2, 3), value)}
        self.moments = OptimizerState(4, {"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3) * 2})
        self.loss_scale = LossScale()

    def local_parameters(self) -> dict[str, Tensor]:
        return self.weights

    def gather(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(local)

    scatter = gather

    def optimizer_state(self) -> OptimizerState:
        return self.moments

    def load_weights(self, full: dict[str, Tensor]) -> None:
        self.weights = full

    def load_optimizer_state(self, state: OptimizerState) -> None:
        self.moments = state


def save(folder: Path, step: int, keep: int = 2) -> None:
    checkpoint.save(
        folder, OneRank(float(step)), None, checkpoint.RunState(step=step), {"config": {"seed": 1}}, keep=keep
    )


def test_saved_and_loaded_and_only_the_newest_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    found = checkpoint.list_checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-00000010", "step-00000100"]
    engine = OneRank(0.0)
    engine.moments = OptimizerState()
    state = checkpoint.restore(checkpoint.read(found[-1]), engine, None)
    assert state.step == 100
    assert torch.equal(engine.weights["w"], torch.full((2, 3), 100.0))
    assert (engine.moments.steps, engine.moments.exp_avg_sq["w"][0, 0]) == (4, 2.0)


def test_what_was_being_written_is_not_found(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-00000006").mkdir()  # without its state.json
    (tmp_path / ".step-00000007.tmp").mkdir()
    (tmp_path / ".step-00000007.tmp" / "state.json").write_text("{}")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000005"]


def test_damage_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = tmp_path / "step-00000005"
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"weights.safetensors cannot be read"):
        checkpoint.read(folder)
    (folder / "weights.safetensors").write_bytes(whole)
    other = OneRank(0.0)
    other.weights = {"v": torch.zeros(1)}
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(checkpoint.read(folder), other, None)
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read"):
        checkpoint.read_state(folder)


def test_a_disk_that_cannot_be_written_is_one_line_and_leaves_the_old(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / ".step-00000006.tmp").write_text("a file where the folder should go")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path, 6)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000005"]
    assert json.loads((tmp_path / "step-00000005" / "state.json").read_text())["config"] == {"seed": 1}
