"""Exports that cannot be right are not published."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from scalevit.errors import UserError
from scalevit.export.base import ModelDescription
from scalevit.export.huggingface_folder import HuggingFaceFolder
from scalevit.export.publish import publish
from scalevit.export.source import find_source
from scalevit.export.timm_model import as_timm_model
from scalevit.export.timm_weights import TimmWeights
from scalevit.export.trained_model import read_model
from scalevit.models.mlps import MlpView, NoMlp
from scalevit.models.reductions.base import fraction_of


class WrongWeights(TimmWeights):
    """Writes one weight that the model does not have."""

    def write(self, model: nn.Module, description: ModelDescription, target: Path, *, tied: bool) -> None:
        with torch.no_grad():
            weight = model.get_parameter("head.weight")
            weight[0] += 0.01
            super().write(model, description, target, tied=tied)
            weight[0] -= 0.01


class WrongSize(TimmWeights):
    """Writes a classifier of fewer classes."""

    def write(self, model: nn.Module, description: ModelDescription, target: Path, *, tied: bool) -> None:
        head, model.head = model.head, nn.Linear(49, 2)
        fewer = replace(description, model=description.model.model_copy(update={"num_classes": 2}))
        super().write(model, fewer, target, tied=tied)
        model.head = head


class Damaged(TimmWeights):
    """Writes a file that cannot be read."""

    def write(self, model: nn.Module, description: ModelDescription, target: Path, *, tied: bool) -> None:
        super().write(model, description, target, tied=tied)
        target.write_bytes(target.read_bytes()[:1000])


def test_an_export_that_cannot_be_read_back_is_named_as_the_user_did(runs: Path, tmp_path: Path) -> None:
    model, description = read_model(find_source(str(runs / "grouped")))
    target = tmp_path / "x.safetensors"
    with pytest.raises(UserError) as error:
        publish(Damaged(), model, description, target, tied=False)
    assert str(error.value).startswith(f"{target}: not written: export {target}: cannot be read (")
    assert ".tmp" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("exporter", "message"),
    [(WrongWeights(), "for 1 images its logits differ from the model's by"), (WrongSize(), "its output is [1, 2]")],
)
def test_an_export_that_computes_something_else(
    exporter: TimmWeights, message: str, runs: Path, tmp_path: Path
) -> None:
    model, description = read_model(find_source(str(runs / "grouped")))
    with pytest.raises(UserError, match="not written") as error:
        publish(exporter, model, description, tmp_path / "x.safetensors", tied=False)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFaceFolder, "write", full)
    model, description = read_model(find_source(str(runs / "grouped")))
    with pytest.raises(UserError, match=r"x: cannot be written \(No space left on device\)"):
        publish(HuggingFaceFolder(), model, description, tmp_path / "x", tied=False)
    assert list(tmp_path.iterdir()) == []


def test_models_that_timm_cannot_build(runs: Path) -> None:
    model, description = read_model(find_source(str(runs / "thin")))
    MlpView(model.blocks[1].mlp).narrow(20)
    with pytest.raises(
        UserError, match=r"timm cannot build it .* \(blocks\.1\.mlp\.fc1\.bias is \[20\], timm's is \[49\]\)"
    ):
        as_timm_model(model, description)
    model.blocks[1].mlp = NoMlp()
    with pytest.raises(UserError, match=r"\(blocks\.1\.mlp\.fc1\.bias is missing, timm's is \[49\]\)"):
        as_timm_model(model, description)


@pytest.mark.parametrize("width", [36, 48, 49, 192, 384, 768, 1408])
def test_every_hidden_width_has_a_ratio(width: int) -> None:
    """Where int(width * (hidden / width)) is hidden - 1, another ratio is found."""
    hiddens = range(1, 4 * width)
    assert [hidden for hidden in hiddens if int(width * fraction_of(hidden, width)) != hidden] == []
    if width in (49, 1408):
        assert [hidden for hidden in hiddens if int(width * (hidden / width)) != hidden] != []
