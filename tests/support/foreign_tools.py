"""What reads exports without scalevit: `python foreign_tools.py TOOL FOLDER`, in any environment that has the tool.

    python tests/support/foreign_tools.py timm FOLDER    # timm and torch
    python tests/support/foreign_tools.py onnx FOLDER    # onnxruntime and numpy

FOLDER has `NAME.safetensors` with `NAME.json`, `NAME.tied.safetensors`, `NAME.hf/`, `NAME.pt2` and `NAME.onnx` for each
`expected/NAME.npz`, which holds `images` and the `logits` of our model. Prints the largest difference of a logit for
each export as JSON, and ends with 1 if one is above 1e-4 or if scalevit could be imported.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4


def with_timm(folder: Path, name: str, images: np.ndarray) -> dict[str, np.ndarray]:
    import timm
    import torch
    from safetensors.torch import load_file, load_model

    config = json.loads((folder / f"{name}.json").read_text())
    architecture, arguments = config["architecture"], config["model_args"]
    file = str(folder / f"{name}.safetensors")
    strict = timm.create_model(architecture, **arguments)
    strict.load_state_dict(load_file(file), strict=True)
    tied = timm.create_model(architecture, **arguments)
    for module, shared in json.loads((folder / f"{name}.tied.json").read_text())["tied_modules"].items():
        tied.set_submodule(module, tied.get_submodule(shared))
    load_model(tied, folder / f"{name}.tied.safetensors", strict=True)
    models = {
        "create_model": timm.create_model(architecture, checkpoint_path=file, **arguments),
        "load_state_dict": strict,
        "tied": tied,
        "local-dir": timm.create_model(f"local-dir:{folder / name}.hf", pretrained=True),
        "torch.export": torch.export.load(folder / f"{name}.pt2").module(),
    }
    with torch.no_grad():
        return {
            form: (model if form == "torch.export" else model.eval())(torch.from_numpy(images)).numpy()
            for form, model in models.items()
        }


def with_onnx(folder: Path, name: str, images: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return {"onnx": session.run(None, {"images": images})[0]}


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    run = {"timm": with_timm, "onnx": with_onnx}[tool]
    differences = {}
    for path in sorted((folder / "expected").glob("*.npz")):
        with np.load(path) as expected:
            images, logits = expected["images"], expected["logits"]
        for count in (1, len(images)):
            for form, found in run(folder, path.stem, images[:count]).items():
                difference = float(np.abs(found - logits[:count]).max())
                differences[f"{path.stem} {form} batch {count}"] = difference
    print(json.dumps(differences))
    ours = ("scalevit", *(("torch", "timm") if tool == "onnx" else ()))
    unwanted = [name for name in ours if sys.modules.get(name) is not None] or find_spec("scalevit")
    sys.exit(bool(unwanted) or not differences or max(differences.values()) > TOLERANCE)


if __name__ == "__main__":
    main()
