"""The lines that are printed when a run starts."""

from pathlib import Path

import pytest
import timm
import torch

from launching import QUICKSTART
from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.models.build import build_model
from scalevit.models.costs import model_costs
from scalevit.models.weights.write import write_weights
from scalevit.training.banner import banner
from scalevit.training.run import prepare
from scalevit.tying import canonical_state

SETTINGS = ["data.workers=0", "model.kwargs.depth=2", "model.kwargs.embed_dim=24", "train.micro_batch=7"]


def lines(folder: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> dict[str, str]:
    monkeypatch.chdir(folder)
    data = [f"data.train={digits}/train", f"data.validation={digits}/validation"]
    run = prepare(load_config(QUICKSTART, [*SETTINGS, *data, *settings]))
    costs = model_costs(run.config.model, run.config.reduction)
    model = run.build_engine._build_model()
    shown = banner(run.config, run.world, run.data, costs, model, run.folder.path, run.initial_weights)
    return {name: text for name, _, text in (line.strip().partition("  ") for line in shown.splitlines())}


def test_a_banner_names_all_that_a_run_is(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = lines(tmp_path, digits, monkeypatch)
    assert list(shown) == ["run", "device", "model", "MLPs", "data", "steps"]
    assert shown["run"] == "quickstart, in runs/quickstart"
    assert shown["device"] == "CPU, ZeRO 1, fp32"
    assert shown["model"].startswith("vit_tiny_patch16_224, 16 px, reduction grouped: ")
    assert shown["MLPs"] == "eager PyTorch: the kernels need a GPU"
    assert shown["data"] == "1,437 training and 360 validation images, 10 classes"
    assert shown["steps"] == (
        "1,123 in 50 epochs of 22.5; 64 images per step, 11 micro-batches of 6 per rank, 2 rows of padding (3.1%)"
    )


def test_a_banner_says_what_differs_from_the_usual(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = ["optimizer.lr=0.02", "optimizer.lr_base_batch=256", "optimizer.lr_scaling=sqrt"]
    shown = lines(
        tmp_path, digits, monkeypatch, "model.num_classes=12", "train.max_steps=9", "kernels.mlp=eager", *scaled
    )
    assert shown["lr"] == "0.01 at the peak: 0.02 for 256 images per step, scaled with the square root of the batch"
    assert shown["data"].endswith("10 classes, the model has 12")
    assert ", stopping after 9; " in shown["steps"]
    assert shown["MLPs"] == "eager PyTorch"


@pytest.mark.parametrize(("strategy", "then"), [("grouped", "; then reduced"), ("none", ""), ("thin", None)])
def test_a_banner_says_what_initial_weights_cover(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, then: str | None
) -> None:
    """Those of a larger image, a larger classifier and no reduction."""
    kwargs = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 4, "global_pool": "avg"}
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=12, **kwargs)
    torch.save(other.state_dict(), tmp_path / "timm.pth")
    settings = ["model.initial_weights=timm.pth", f"reduction.strategy={strategy}", "model.kwargs.num_heads=2"]
    if then is None:
        with pytest.raises(UserError, match=r"weights timm\.pth: does not fit in the shape of "):
            lines(tmp_path, digits, monkeypatch, *settings)
    else:
        shown = lines(tmp_path, digits, monkeypatch, *settings)["weights"]
        tensors = len(other.state_dict())
        expected = f"timm.pth: {tensors - 2} of {tensors} tensors; head.bias, head.weight newly initialised"
        assert shown == f"{expected}; pos_embed resampled{then}"


def test_a_banner_names_the_set_of_weights_of_a_checkpoint(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(QUICKSTART, SETTINGS)
    sets = [build_model(config.model, config.reduction, seed=seed).state_dict() for seed in (0, 1)]
    torch.save({"epoch": 1, "state_dict": sets[0], "state_dict_ema": sets[1]}, tmp_path / "last.pth.tar")
    shown = lines(tmp_path, digits, monkeypatch, "model.initial_weights=last.pth.tar")["weights"]
    tensors = len(canonical_state(build_model(config.model, config.reduction, seed=0)))
    assert shown == f"last.pth.tar: all {tensors} tensors of its EMA; reduced already"


def test_a_classifier_of_other_classes_is_named(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many, so that it is taken over."""
    config = load_config(QUICKSTART, [*SETTINGS, "reduction.strategy=none"])
    network = build_model(config.model, config.reduction, seed=0)
    about = {"model": config.model, "reduction": config.reduction, "tied": {}}
    for names, remark in (("abcdefghij", "; the classifier is of other classes (a, b, c, ...)"), ("0123456789", "")):
        write_weights(tmp_path / "w.safetensors", canonical_state(network), **about, classes=list(names))
        settings = ["model.initial_weights=w.safetensors", "reduction.strategy=none"]
        tensors = len(canonical_state(network))
        shown = lines(tmp_path, digits, monkeypatch, *settings)["weights"]
        assert shown == f"w.safetensors: all {tensors} tensors{remark}"
