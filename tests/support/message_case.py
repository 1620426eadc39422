"""Where a case of tests/test_troubleshooting.py runs, and the list of all cases."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scalevit.checkpoint.folder import digest
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.models.build import build_model
from scalevit.runs.folder import RunFolder
from scalevit.training.resume import find_resumable
from scalevit.training.run import prepare

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
