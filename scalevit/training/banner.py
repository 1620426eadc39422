"""The lines that are printed when a run starts: run folder, device, model, kernels, data, steps, initial weights."""

from pathlib import Path

from torch import nn

from scalevit.config.tree import Config
from scalevit.data.loading.base import TrainingBatches
from scalevit.data.order.image_sizes import ImageSizes
from scalevit.distributed import World
from scalevit.models.costs import ModelCosts
from scalevit.models.fused_mlp import describe_mlps
from scalevit.models.weights.coverage import Coverage
from scalevit.models.weights.read import read_classes
from scalevit.training.open_data import RunData


def banner(
    config: Config,
    world: World,
    data: RunData,
    costs: ModelCosts,
    model: nn.Module,
    folder: Path,
    weights: Coverage | None,
    task: str | None = None,
) -> str:
    """A few lines, one for each matter.

    Args:
        config: of the run.
        world: its ranks.
        data: with the split that the run uses.
        costs: of the model.
        model: with its kernels.
        folder: of the run.
        weights: what the initial weights gave to the model, where there are any.
        task: what the task has to say of itself.
    """
    lines = {
        "run": f"{config.name}, in {folder}",
        "device": f"{_ranks(world)}, {config.engine.label}, {config.train.precision}",
        "model": f"{config.model.name}, {config.model.image_size} px, reduction {config.reduction.strategy}: "
        f"{costs.parameters:,} parameters",
        "MLPs": describe_mlps(model, config.kernels, world.device),
        "data": _data(config, data),
        "steps": _steps(config, data.train),
    }
    if data.train.image_sizes is not None:
        lines["images"] = _image_sizes(config, data.train.image_sizes)
    if config.optimizer.lr_base_batch is not None:
        lines["lr"] = _peak_lr(config)
    if task is not None:
        lines["task"] = task
    if config.optimizer.frozen:
        frozen = config.optimizer.frozen
        lines["frozen"] = frozen if isinstance(frozen, str) else ", ".join(frozen)
    if weights is not None:
        lines["weights"] = weights_line(config, weights) + _other_classes(config, weights, data)
    width = max(map(len, lines))
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines.items())


def weights_line(config: Config, weights: Coverage) -> str:
    """What the config's initial weights gave to the model."""
    line = f"{config.model.weights_source}: {weights}"
    if not config.reduction.changes_model or config.reduction.factory_arguments():
        return line
    return f"{line}; {'reduced already' if weights.already_reduced else 'then reduced'}"


def _image_sizes(config: Config, sizes: ImageSizes) -> str:
    def shares(epoch: int) -> str:
        return ", ".join(
            f"{share:.0%} of {side} px" for side, share in zip(sizes.sides, sizes.probabilities(epoch), strict=True)
        )

    text = f"in the first epoch {shares(0)}; in the last {shares(sizes.epochs - 1)}" if sizes.progressive else shares(0)
    return f"in training {text}; evaluated at {config.model.image_size} px"


def _peak_lr(config: Config) -> str:
    given = config.optimizer
    how = "with the square root of the batch" if given.lr_scaling == "sqrt" else "linearly"
    return f"{config.peak_lr:g} at the peak: {given.lr:g} for {given.lr_base_batch:,} images per step, scaled {how}"


def _other_classes(config: Config, weights: Coverage, data: RunData) -> str:
    """A remark where the classifier is taken over from other classes, of which there are as many."""
    assert config.model.weights_source is not None
    before = read_classes(config.model.weights_source)
    if weights.fresh or before is None or data.classes is None or before == data.classes:
        return ""
    return f"; the classifier is of other classes ({', '.join(before[:3])}, ...)"


def _ranks(world: World) -> str:
    name = "CPU" if world.device.type == "cpu" else world.device_name
    return name if world.size == 1 else f"{world.size} x {name}"


def _data(config: Config, data: RunData) -> str:
    classes = config.model.num_classes
    if data.classes is not None and len(data.classes) != classes:
        named = f"{len(data.classes)} classes, the model has {classes}"
    else:
        named = f"{classes} classes" if data.classes else f"{classes} classes without names"
    return f"{data.train.samples:,} training and {len(data.evaluation.dataset):,} validation images, {named}"


def _steps(config: Config, loader: TrainingBatches) -> str:
    split, epochs = loader.split, config.train.epochs
    whole, limit = loader.steps_in(epochs), config.train.max_steps
    stop = "" if limit is None or limit >= whole else f", stopping after {limit:,}"
    batches = "1 micro-batch" if split.accumulation == 1 else f"{split.accumulation} micro-batches"
    padding = f", {split.padding} rows of padding ({split.padding_share:.1%})" if split.padding else ""
    return (
        f"{whole:,} in {epochs} epochs of {whole / epochs:,.1f}{stop}; {split.global_batch:,} "
        f"images per step, {batches} of {split.size} per rank{padding}"
    )
