"""Runs on grey images: from RGB weights, split into micro-batches, evaluated, exported and used."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from task_runs import config, train, write

from launching import losses
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.export.classifier import open_classifier
from scalevit.export.source import find_source
from scalevit.models.build import build_model

GREY = ["model.in_chans=1", "data.augmentation.random_erasing=0.5", "data.augmentation.hflip=0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 3 steps that starts from RGB weights."""
    folder = tmp_path_factory.mktemp("grey")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rgb = config()
        write(folder / "rgb.safetensors", build_model(rgb.model, rgb.reduction, seed=1), rgb)
        return folder / train("grey", *GREY, "model.initial_weights=rgb.safetensors", steps=3)


def test_neither_micro_batches_nor_the_device_layout_change_a_run(run, monkeypatch) -> None:
    monkeypatch.chdir(run.parents[1])
    start = "model.initial_weights=rgb.safetensors"
    other = train("other", *GREY, start, "train.micro_batch=12", "train.channels_last=false", steps=3)
    # Sums of rounded terms in other orders.
    np.testing.assert_allclose(losses(other), losses(run), rtol=1e-5)


def test_evaluated_used_and_exported(run, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parents[1])
    main(["evaluate", str(run)])
    assert json.loads(capsys.readouterr().out)["data_faults"] == 0
    main(["export", str(run), "--to", "timm", "grey.safetensors"])
    call = json.loads(Path("grey.json").read_text())
    assert call["pretrained_cfg"]["input_size"] == [1, 16, 16]
    assert len(call["pretrained_cfg"]["mean"]) == 1
    model = timm.create_model(call["architecture"], **call["model_args"], checkpoint_path="grey.safetensors")
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    main(["export", str(run), "--to", "huggingface", "grey"])
    classifier, photo = open_classifier(find_source("grey")), Image.new("RGB", (20, 20), (200, 0, 0))
    assert classifier.transform(photo).shape == (1, 16, 16)
    assert classifier.logits(classifier.finish(classifier.transform(photo)[None])).shape == (1, 10)


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"model.in_chans = 4: must be 3 \(RGB images\) or 1 \(grey ones\)"):
        load_config("quickstart", ["model.in_chans=4"])
