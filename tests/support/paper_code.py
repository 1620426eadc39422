"""Runs the paper's own train.py for twenty fixed steps of each strategy; prints losses, learning rates and EMA as JSON.

python tests/support/paper_code.py FOLDER > tests/training/paper_20_steps.json    # FOLDER has the paper's code

Its `main` runs unchanged: parser, strategies, timm's optimizer, schedule, loss and EMA, training loop. Replaced are the
data (`create_dataset`, `create_loader`) and the initial values; the rest only listens. It runs on the CPU and in fp32,
without `--amp`, whose loss scaling is for GPUs. Imports no scalevit.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from paper_steps import (
    CLASSES,
    EMA_DECAY,
    EPOCHS,
    MICRO_BATCHES,
    ROWS,
    SIDE,
    SMALL,
    STEPS,
    STRATEGIES,
    WARMUP_EPOCHS,
    WARMUP_LR,
    batches,
    initial_value,
    record,
)

COMMIT = "AnanthaPadmanaban-KrishnaKumar/parameter-efficient-vit-mlps c21e085"
# The commands in the paper's README, without --amp and what concerns GPUs or data, and with these changes of size.
README = (
    "--model vit_base_patch16_224 --grad-accum-steps 2 --opt adamw --lr 0.001 --weight-decay 0.05 --sched cosine "
    "--mixup 0.8 --cutmix 1.0 --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --aug-repeats 3 --channels-last --model-ema "
    "--seed 42"
)
CHANGES = (
    f"--batch-size {ROWS} --epochs {EPOCHS} --warmup-epochs {WARMUP_EPOCHS} --warmup-lr {WARMUP_LR} "
    f"--drop-path 0 --model-ema-decay {EMA_DECAY} --num-classes {CLASSES} --img-size {SIDE} --device cpu --workers 0"
)
STRATEGY = "--reduction-strategy {} --reduction-mlp-ratio {}"
RATIOS = {"grouped": 0.707, "shallow": 0.5, "thin": 2.0}


class Listener:
    """Gives the paper's code its data and initial values, and records what it computes."""

    def __init__(self, paper: Any) -> None:
        self.losses: list[float] = []
        """Of micro-batches."""
        self.lrs: list[float] = []
        """Of steps."""
        self.average: nn.Module | None = None
        self._create_model, self._create_optimizer = paper.create_model, paper.create_optimizer_v2
        self._criterion, self._ema = paper.SoftTargetCrossEntropy, paper.utils.ModelEmaV3
        paper.create_dataset = lambda *_, **__: ()
        paper.create_loader = lambda *_, **__: Loader()
        paper.create_model, paper.create_optimizer_v2 = self.model, self.optimizer
        paper.SoftTargetCrossEntropy, paper.utils.ModelEmaV3 = self.criterion, self.ema

    def model(self, *arguments: Any, **options: Any) -> nn.Module:
        built: nn.Module = self._create_model(*arguments, **options)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                parameter.copy_(torch.from_numpy(initial_value(name, tuple(parameter.shape))))
        return built

    def optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer = self._create_optimizer(*arguments, **options)
        built.register_step_pre_hook(lambda own, *_: self.lrs.append(own.param_groups[0]["lr"]))
        return built

    def criterion(self) -> nn.Module:
        built: nn.Module = self._criterion()
        built.register_forward_hook(lambda _, __, loss: self.losses.append(loss.item()))
        return built

    def ema(self, *arguments: Any, **options: Any) -> Any:
        built = self._ema(*arguments, **options)
        self.average = built.module
        return built

    def take(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What was kept since the last call: for the file, and the whole average."""
        assert self.average is not None
        losses = np.array(self.losses).reshape(STEPS, MICRO_BATCHES).mean(1).round(7).tolist()
        average = {name: tensor.detach().numpy().copy() for name, tensor in self.average.named_parameters()}
        kept = {"losses": losses, "lr": self.lrs, "ema": record(average)}
        self.losses, self.lrs = [], []
        return kept, average


class Loader:
    """Gives an epoch of the fixed batches each time, as timm's loader with the prefetcher: mixed, on the device."""

    def __init__(self) -> None:
        self._epoch = 0

    def __len__(self) -> int:
        return STEPS // EPOCHS * MICRO_BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self._epoch * STEPS // EPOCHS, (self._epoch + 1) * STEPS // EPOCHS):
            for images, labels, weight in batches(step):
                targets = mixup_target(torch.from_numpy(labels), CLASSES, lam=weight, smoothing=0.1)
                yield torch.from_numpy(images), targets
        self._epoch += 1


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkout of the paper's code")
    parser.add_argument("--averages", type=Path, help="a file for the whole averages, as .npz")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.folder))
    import train as paper

    logging.disable()
    listener, results, averages = Listener(paper), {}, {}
    kwargs = " ".join(f"{key}={value}" for key, value in {**SMALL, "img_size": SIDE}.items())
    for strategy in STRATEGIES:
        reduction = f"{STRATEGY.format(strategy, RATIOS[strategy])} " if strategy in RATIOS else ""
        command = f"{README} {CHANGES} {reduction}--model-kwargs {kwargs}"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            sys.argv = ["train.py", *command.split(), "--val-split", "", "--output", folder]
            paper.main()
        kept, average = listener.take()
        results[strategy] = {"command": f"train.py {command}", **kept}
        averages.update({f"{strategy}/{name}": tensor for name, tensor in average.items()})
    if arguments.averages is not None:
        np.savez(arguments.averages, **averages)
    made_by = {"paper": COMMIT, "timm": timm.__version__, "torch": torch.__version__.partition("+")[0]}
    sys.stdout.write(layout({"made_by": made_by, "strategies": results}))


def layout(value: Any, indent: str = "") -> str:
    """JSON with a line for each list."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key)}: {layout(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" + ("\n" if not indent else "")


if __name__ == "__main__":
    main()
