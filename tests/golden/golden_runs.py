"""Short runs whose losses, gradient norms and final weights are kept in `golden.json`: a refactoring changes none.

    python tests/golden/golden_runs.py     # records them again, after a change of numerics that has its own parity test

They start as a user starts them (`launch/train.py`, overrides) and are read from the run folder, so they know nothing
of the library's inside. The file is made on one machine; `golden_machine` says whether this one computes the same bits.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launching import QUICKSTART, Workplace, metrics

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 24
SIZES = {"depth": 4, "embed_dim": 48}
# The recipe's randomness is on: mixing, repeats, drop-path, erasing, RandAugment; so are smoothing and the EMA.
SETTINGS = [
    *(f"model.kwargs.{key}={value}" for key, value in SIZES.items()),
    "model.drop_path=0.2",
    "data.augmentation.aug_repeats=3",
    "data.augmentation.mixup=0.8",
    "data.augmentation.cutmix=1.0",
    "data.augmentation.random_erasing=0.25",
    "data.augmentation.auto_augment=rand-m9-mstd0.5-inc1",
    "data.augmentation.interpolation=random",
    "loss.label_smoothing=0.1",
    "train.global_batch=64",
    "train.micro_batch=16",
    f"train.max_steps={STEPS}",
    "train.log_every_steps=1",
    "train.checkpoint.every_epochs=50",
    "evaluation.every_epochs=50",
    # A key bias has no gradient but rounding noise, which Adam's 1e-8 would enlarge to whole steps.
    "optimizer.args.eps=1e-5",
]
# Nothing is drawn for a row of a batch: such a run does not depend on how steps are laid out and drawn for.
WITHOUT_DRAWS = [
    "model.drop_path=0",
    "data.augmentation.aug_repeats=1",
    "data.augmentation.mixup=0",
    "data.augmentation.cutmix=0",
    "data.augmentation.random_erasing=0",
]
RUNS: dict[str, tuple[int, list[str]]] = {
    "grouped-zero1-2-without-draws": (2, ["engine.stage=1", *WITHOUT_DRAWS]),
    "baseline-zero1-1": (1, ["reduction.strategy=none", "engine.stage=1"]),
    "grouped-zero1-2": (2, ["reduction.group_size=2", "engine.stage=1", "ema.shared_parameters=per_use"]),
    "shallow-zero3-2": (2, ["reduction.strategy=shallow", "engine.stage=3", "optimizer.clip_grad=null"]),
    "thin-fsdp-2": (2, ["reduction.strategy=thin", "engine.name=fsdp", "schedule.update=epoch"]),
    "grouped-fsdp-1-recompute": (1, ["engine.name=fsdp", "train.activation_checkpointing=true"]),
    "grouped-zero3-2-recompute": (2, ["engine.stage=3", "train.activation_checkpointing=true"]),
    "grouped-zero2-2-fast": (2, ["engine.stage=2", "data.transforms=fast", "reduction.scale=0.8"]),
    "baseline-zero0-1-fp16": (1, ["reduction.strategy=none", "engine.stage=0", "train.precision=fp16"]),
}


def golden_machine() -> dict[str, Any]:
    """What decides the bits of a result, as far as it can be seen."""
    flags = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        flags = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": flags.get("model name", platform.machine()),
        "model": [flags.get(key) for key in ("vendor_id", "cpu family", "model", "stepping")],
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def run_golden(folder: Path) -> dict[str, Any]:
    """Trains every run of `RUNS` in a folder that has `data/digits`; returns what is kept of each, by name."""
    workplace = Workplace(folder)
    results = {}
    for name, (ranks, settings) in RUNS.items():
        # Workers change no bit, but take seconds to start. Beside one, a single rank computes with a thread less than
        # there are cores, as two ranks on two cores do.
        workers = f"data.workers={int(ranks == 1)}"
        done = workplace.run(name, ["--config", QUICKSTART, f"name={name}", workers, *SETTINGS, *settings], ranks=ranks)
        assert done.status == 0, done.output[-3000:]
        results[name] = _result(folder / "runs" / name)
    return results


def _result(run: Path) -> dict[str, Any]:
    records = metrics(run)
    assert len(records) == STEPS
    return {
        "losses": [record["loss"] for record in records],
        "grad_norms": [record["grad_norm"] for record in records],
        "weights": _digest(run / "final.safetensors"),
        "ema": _digest(run / "final_ema.safetensors"),
    }


def _digest(file: Path) -> dict[str, Any]:
    tensors = sorted(load_file(file).items())
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.tobytes())
    squares = sum(float(np.square(tensor, dtype=np.float64).sum()) for _, tensor in tensors)
    return {"sha256": digest.hexdigest(), "norm": squares**0.5}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = run_golden(Path(folder))
    GOLDEN.write_text(json.dumps({"machine": golden_machine(), "runs": results}, indent=1) + "\n")
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    main()
