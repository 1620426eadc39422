"""Cases of tests/test_troubleshooting.py: messages about initial weights."""

from pathlib import Path

import huggingface_hub
import numpy as np
import torch

from message_case import Place, case
from scalevit.models.build import build_model
from scalevit.models.weights.write import write_weights
from scalevit.training.run import prepare_evaluation
from scalevit.tying import canonical_state, tied_names


@case("weights ...: no such file")
def _(place: Place) -> None:
    place.prepare("model.initial_weights=vit.pth")


@case("weights ...: cannot be read (...)")
def _(place: Place) -> None:
    Path("vit.pth").write_bytes(b"<html>")
    place.prepare("model.initial_weights=vit.pth")


@case("weights ...: is cut or empty: copy or download it again")
def _(place: Place) -> None:
    setting = place.weights()
    Path("weights.pth").write_bytes(Path("weights.pth").read_bytes()[:5000])
    place.prepare(setting)


@case("weights ...: is an export (--to ...): name the run or its weights")
def _(place: Place) -> None:
    Path("x.onnx").touch()
    place.prepare("model.initial_weights=x.onnx")


@case("weights ...: lacks ... of this model...")
def _(place: Place) -> None:
    place.prepare(place.weights(), "model.kwargs.depth=4")


@case("weights ...: has ..., which this model lacks...")
def _(place: Place) -> None:
    place.prepare(place.weights(kwargs={**place.config().model.kwargs, "depth": 4}))


@case(
    "weights ...: unreduced, and this reduction sets how a model is built: make its weights with `scalevit reduce ...`"
)
def _(place: Place) -> None:
    place.prepare(place.weights(), "reduction.strategy=thin")


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


@case("config: model.pretrained = true, and initial_weights = ...: give one of the two (...)")
def _(place: Place) -> None:
    place.prepare(place.weights(), "model.pretrained=true")


@case("weights ...: holds no state dict")
def _(place: Place) -> None:
    torch.save({"epoch": 3}, "vit.pth")
    place.prepare("model.initial_weights=vit.pth")


@case("weights ...: ... has NaN or infinite values: the run that wrote it has diverged")
def _(place: Place) -> None:
    setting = place.weights()
    state = torch.load("weights.pth")
    state["patch_embed.proj.bias"][0] = float("nan")
    torch.save(state, "weights.pth")
    place.prepare(setting)


@case("weights ...: ... has dtype ..., the model's is ...: save floating-point weights")
def _(place: Place) -> None:
    setting = place.weights()
    state = torch.load("weights.pth")
    torch.save({name: (100 * tensor).to(torch.int8) for name, tensor in state.items()}, "weights.pth")
    place.prepare(setting)


@case("weights ...: model.initial_weights_set = ..., but the file has ...: leave it at 'auto'")
def _(place: Place) -> None:
    place.prepare(place.weights(), "model.initial_weights_set=ema")


@case("weights ...: has ... blocks, and this model ...")
def _(place: Place) -> None:
    np.savez("vit.npz", **{"Transformer/encoderblock_11/LayerNorm_0/scale": np.ones(24)})
    place.prepare("model.initial_weights=vit.npz")


@case("weights ...: a folder without a config.json of timm, which names the architecture...")
def _(place: Place) -> None:
    place.prepare("model.initial_weights=shards")


@case("weights ...: timm has no such pretrained weights of ...")
def _(place: Place) -> None:
    place.prepare("model.initial_weights=timm:vit_tiny_patch16_224.mae")


@case("weights ...: not in the cache ..., and cannot be downloaded (...): ...")
def _(place: Place) -> None:
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place.folder / "hub"))
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place.prepare("model.pretrained=true")
