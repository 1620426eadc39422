"""What a person is told when a run starts."""

from pathlib import Path

import pytest
import torch

from launching import QUICKSTART
from scalevit.config.loading import load_config
from scalevit.models.build import build_model
from scalevit.models.costs import model_costs
from scalevit.models.reductions.none import NoReduction
from scalevit.models.weights.write import write_weights
from scalevit.training.banner import banner
from scalevit.training.run import prepare
from scalevit.tying import canonical_state, tied_names

SETTINGS = ["data.workers=0", "model.kwargs.depth=2", "model.kwargs.embed_dim=24", "train.micro_batch=7"]


def lines(folder: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> dict[str, str]:
    monkeypatch.chdir(folder)
    data = [f"data.train={digits}/train", f"data.validation={digits}/validation"]
    run = prepare(load_config(QUICKSTART, [*SETTINGS, *data, *settings]))
    costs = model_costs(run.config.model, run.config.reduction)
    shown = banner(run.config, run.world, run.data, costs, run.build_engine._build_model(), run.folder.path)
    return {name: text for name, _, text in (line.strip().partition("  ") for line in shown.splitlines())}


def test_a_banner_names_all_that_a_run_is(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = lines(tmp_path, digits, monkeypatch)
    assert list(shown) == ["run", "device", "model", "MLPs", "data", "steps"]
    assert shown["run"] == "quickstart, in runs/quickstart"
    assert shown["device"] == "CPU, ZeRO 1, fp32"
    assert shown["model"].startswith("vit_tiny_patch16_224, 16 px, reduction grouped: ")
    assert shown["MLPs"].startswith("eager PyTorch: ")
    assert shown["data"] == "1,437 training and 360 validation images, 10 classes"
    assert shown["steps"] == (
        "1,123 in 50 epochs of 22.5; 64 images per step, 11 micro-batches of 6 per rank, 2 rows of padding (3.1%)"
    )


def test_a_banner_says_what_differs_from_the_usual(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = lines(tmp_path, digits, monkeypatch, "model.num_classes=12", "train.max_steps=9", "kernels.mlp=eager")
    assert shown["data"].endswith("10 classes, the model has 12")
    assert ", stopping after 9; " in shown["steps"]
    assert shown["MLPs"] == "eager PyTorch"


def test_a_banner_says_what_the_initial_weights_lack(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(QUICKSTART, SETTINGS)
    plain, reduced = tmp_path / "plain.pth", tmp_path / "reduced.safetensors"
    torch.save(build_model(config.model, NoReduction(), seed=0).state_dict(), plain)
    network = build_model(config.model, config.reduction, seed=0)
    write_weights(
        reduced, canonical_state(network), model=config.model, reduction=config.reduction, tied=tied_names(network)
    )

    def shown(*settings: str) -> str:
        return lines(tmp_path, digits, monkeypatch, *settings)["weights"]

    assert shown(f"model.initial_weights={plain}") == f"from {plain}, then reduced"
    assert shown(f"model.initial_weights={plain}", "reduction.strategy=none") == f"from {plain}"
    assert shown(f"model.initial_weights={reduced}") == f"from {reduced}, reduced already"
    assert shown(f"model.initial_weights={plain}", "model.num_classes=12") == (
        f"from {plain}, then reduced; newly initialised: head.bias, head.weight"
    )
