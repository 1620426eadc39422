"""Run folders with models as if trained: weights that no initialisation gives, and class names; and their exports.

python tests/support/trained_runs.py FOLDER    # the exports that `foreign_tools.py` reads, in a new folder
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.export.source import find_source
from scalevit.export.trained_model import read_model
from scalevit.models.build import build_model
from scalevit.models.mlps import mlp_views
from scalevit.models.weights.write import write_weights
from scalevit.tying import tied_names

CLASSES = ["cat", "dog", "owl", "elk", "bee"]
STRATEGIES = ("grouped", "shallow", "thin")
SETTINGS = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "image_size": 16,
        "num_classes": len(CLASSES),
        # Shallow keeps int(0.11 * 147) = 16 units, and int(49 * (16 / 49)) is 15.
        "kwargs": {"patch_size": 4, "embed_dim": 49, "depth": 2, "num_heads": 7, "mlp_ratio": 3.0},
    },
    "data": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop_pct": 0.8},
    "engine": {"name": "fsdp"},
}
REDUCTIONS = {
    "grouped": {"strategy": "grouped"},
    "shallow": {"strategy": "shallow", "keep": 0.11},
    "thin": {"strategy": "thin", "mlp_ratio": 1.0},
}


def write_run(folder: Path, strategy: str, *, seed: int = 0) -> Path:
    """A run folder with config.json and best.safetensors."""
    folder.mkdir(parents=True)
    settings = {**SETTINGS, "reduction": REDUCTIONS[strategy]}
    if strategy == "thin":  # the strategy sets it
        kwargs = {key: value for key, value in SETTINGS["model"]["kwargs"].items() if key != "mlp_ratio"}
        settings["model"] = {**SETTINGS["model"], "kwargs": kwargs}
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_config(folder / "config.json")
    model = build_model(config.model, config.reduction, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, and logits of the size of trained ones
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    about = {"model": config.model, "reduction": config.reduction, "tied": tied_names(model), "classes": CLASSES}
    write_weights(folder / "best.safetensors", dict(model.named_parameters()), **about)
    return folder


FORMS = {"timm": "safetensors", "huggingface": "hf", "torch": "pt2", "onnx": "onnx"}


def write_exports(run: Path, folder: Path, *, with_onnx: bool = True, width: float | None = None) -> None:
    """A run in every form, and its logits, as `foreign_tools.py` expects them in a folder.

    Args:
        width: fraction of the hidden units that is exported.
    """
    name = run.name if width is None else f"{run.name}_cut"
    cut = [] if width is None else ["--width", str(width)]
    for form, suffix in FORMS.items():
        if form != "onnx" or with_onnx:
            main(["export", str(run), str(folder / f"{name}.{suffix}"), "--to", form, *cut])
    main(["export", str(run), str(folder / f"{name}.tied.safetensors"), "--to", "timm", "--tied", *cut])
    model, description = read_model(find_source(str(run)))
    if width is not None:
        for view in {view.module: view for views in mlp_views(model) for view in views}.values():
            view.narrow(int(width * view.hidden))
    side = description.preprocessing.image_size
    images = np.random.default_rng(0).standard_normal((3, 3, side, side), np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    assert np.abs(logits).max() > 0.5, "differences of such logits would show"
    (folder / "expected").mkdir(exist_ok=True)
    np.savez(folder / "expected" / f"{name}.npz", images=images, logits=logits)


if __name__ == "__main__":
    for strategy in STRATEGIES:
        write_exports(write_run(Path(sys.argv[1]) / "runs" / strategy, strategy), Path(sys.argv[1]))
    write_exports(Path(sys.argv[1]) / "runs" / "grouped", Path(sys.argv[1]), width=0.5)
