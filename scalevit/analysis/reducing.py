"""From the weights of a run to those of a reduced model, in a file from which training starts.

Knows configs, weights files and the data of a run; the arithmetic is in `models.reductions.fit`. One process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalevit.analysis.samples import Samples, read_samples
from scalevit.analysis.sensitivity import half_changes, least_damaging_blocks, least_damaging_pairs, pair_changes
from scalevit.config.tree import SECTIONS, Config
from scalevit.data.faults import Fault
from scalevit.distributed import World
from scalevit.errors import SettingError, naming_settings, settings_of
from scalevit.models.build import build_model, create_unreduced
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions import NO_REDUCTION
from scalevit.models.reductions.base import Reduction
from scalevit.models.reductions.fit import reduce_trained
from scalevit.models.reductions.method import FitMethod
from scalevit.models.weights.match import reductions_of
from scalevit.models.weights.read import read_classes
from scalevit.models.weights.structure import in_short, with_structure_of
from scalevit.models.weights.write import write_weights
from scalevit.training.run import with_model_defaults
from scalevit.tying import canonical_state, tied_names


@dataclass(frozen=True)
class TrainedModel:
    """The model of a weights file, with timm's own MLPs, in evaluation mode on its device."""

    path: Path
    config: Config
    """With the model's defaults; `model.initial_weights` is the file, `reduction` that of its weights."""
    network: nn.Module
    classes: tuple[str, ...] | None
    """Names of the labels, where the file has them."""
    device: torch.device


def load_trained(config: Config) -> TrainedModel:
    """The model of `model.initial_weights`, reduced as the file says or, of a plain state dict, as its tensors show.

    Raises:
        UserError: the weights do not fit the config's model, or lack its classifier.
    """
    config = with_model_defaults(config)
    assert config.model.initial_weights is not None, "checked by the caller"
    path = Path(config.model.initial_weights)
    device = World.from_environment().device
    with naming_settings(SECTIONS):
        reduction = _reduction_of_weights(config)
        network = build_model(config.model, reduction, seed=config.seed, need_classifier=True)
    # The reduction that is wanted may be of another kind, whose arguments of timm's factory are not these.
    config = config.model_copy(update={"reduction": reduction})
    return TrainedModel(path, config, network.to(device).eval(), read_classes(path), device)


def _reduction_of_weights(config: Config) -> Reduction:
    """That of `model.initial_weights`; the config's where their tensors fit several (shallow and thin)."""
    model = config.model
    assert model.initial_weights is not None, "checked by the caller"
    with torch.device("meta"):
        unreduced = create_unreduced(model, NO_REDUCTION)
    found = reductions_of(model.initial_weights, unreduced, weights_set=model.initial_weights_set)
    if len(found) > 1:
        depth = len(transformer_blocks(unreduced))
        with settings_of("reduction"):
            wanted = config.reduction.structure(depth)
        found.sort(key=lambda each: each.structure(depth) != wanted)
    return found[0] if found else NO_REDUCTION


@dataclass(frozen=True)
class ReducedModel:
    """A reduced copy of a trained model."""

    config: Config
    """Of the trained model's run, with the reduction; `model.initial_weights` is None."""
    network: nn.Module
    classes: tuple[str, ...] | None
    faults: Sequence[Fault]
    """Bad samples among the calibration images, for which others were taken."""

    def write(self, path: Path) -> Config:
        """Writes a weights file that training takes as initial weights, which are not reduced a second time.

        Returns:
            The config with this file.

        Raises:
            UserError: the file cannot be written.
        """
        write_weights(
            path,
            {name: tensor.cpu() for name, tensor in canonical_state(self.network).items()},
            model=self.config.model,
            reduction=self.config.reduction,
            tied=tied_names(self.network),
            classes=self.classes,
        )
        return with_weights(self.config, path)


def with_weights(config: Config, path: Path | None) -> Config:
    """A config with other initial weights."""
    weights = {} if path is None else {"initial_weights": str(path)}
    return config.model_copy(update={"model": config.model.without_weights().model_copy(update=weights)})


def example_of(trained: TrainedModel, reduction: Reduction) -> tuple[Config, nn.Module]:
    """The config and, on the meta device, the structure of the trained model after a reduction.

    What the reduction leaves as it is (shared or narrower MLPs of the trained model) is kept: the config's reduction is
    then one that has both. Arguments of timm's factory that the trained model's own reduction gave (`thin`) become
    arguments of the model.

    Raises:
        UserError: the reduction does not fit the model or cannot be combined with that of the model, or is the one that
            the model has.
    """
    own, model = trained.config.reduction, trained.config.model
    kept = {key: value for key, value in own.factory_arguments().items() if key not in reduction.factory_arguments()}
    model = model.without_weights().model_copy(update={"kwargs": {**model.kwargs, **kept}})
    with naming_settings(SECTIONS):
        example = build_model(model, reduction, seed=0, device="meta")
        depth = len(transformer_blocks(example))
        with torch.device("meta"):
            unreduced = create_unreduced(model, NO_REDUCTION)
        combined = with_structure_of(trained.network, reduction, example, unreduced)
        with settings_of("reduction"):
            if combined is None:
                reason = f"cannot be combined with {in_short(own)}, which the weights are: name one that has both"
                raise SettingError("strategy", reduction.strategy, reason)
            if combined.structure(depth) == own.structure(depth):
                reason = "the weights are reduced so already: give another strategy, or other settings of this one"
                raise SettingError("strategy", reduction.strategy, reason)
        if combined != reduction:
            example = build_model(model, combined, seed=0, device="meta")
    return trained.config.model_copy(update={"model": model, "reduction": combined}), example


def reduce_weights(
    trained: TrainedModel,
    reduction: Reduction,
    method: FitMethod,
    samples: Callable[[], Samples],
    *,
    on_use: Callable[[int], None] = lambda block: None,
) -> ReducedModel:
    """Reduces a trained model, see `reduce_trained`.

    Args:
        samples: reads the calibration images; called only if the method needs them.

    Raises:
        UserError: as `example_of`, or the trained model cannot become one of that structure.
    """
    config, example = example_of(trained, reduction)
    read: list[Samples] = []

    def batches() -> Iterator[Tensor]:
        if not read:
            read.append(samples())
        return read[0].image_batches()

    network = reduce_trained(trained.network, example, method, batches, on_use=on_use)
    return ReducedModel(config, network, trained.classes, read[0].faults if read else ())


def calibration_samples(trained: TrainedModel, count: int) -> Samples:
    """Training images at the first positions of the run's order.

    Raises:
        UserError: as `read_samples`.
    """
    return read_samples(trained.config, trained.config.data.train, count, trained.device, classes=trained.classes)


def validation_samples(trained: TrainedModel, count: int) -> Samples:
    """Validation images at the first positions of an order of this seed.

    Raises:
        UserError: as `read_samples`.
    """
    return read_samples(trained.config, trained.config.data.validation, count, trained.device, classes=trained.classes)


def chosen_blocks(
    trained: TrainedModel,
    method: FitMethod,
    samples: Samples,
    *,
    pairs: int | None,
    blocks: int | None,
    on_block: Callable[[int], None] = lambda block: None,
) -> dict[str, Any]:
    """A setting of the reduction that names what changes the trained model's outputs least.

    Each pair of neighbouring blocks is made to share an MLP, or the MLP of each block is narrowed to half, with the
    rest of the model unreduced. The change is the divergence over the calibration images (`sensitivity.Change`).

    Args:
        samples: the calibration images.
        pairs: number of pairs for `groups`, or None.
        blocks: number of blocks for `blocks`, where `pairs` is None.

    Raises:
        SettingError: the model has not as many.
    """
    measure = half_changes if pairs is None else pair_changes
    changes = measure(trained.network, method, samples.image_batches, samples, on_block=on_block)
    divergences = [None if change is None else change.divergence for change in changes]
    if pairs is not None:
        found = least_damaging_pairs(divergences, pairs)
        if found is None:
            raise SettingError("pairs", pairs, "the model has not as many pairs of neighbours that can share")
        return {"groups": found}
    assert blocks is not None, "one of the two is given"
    single = least_damaging_blocks(divergences, blocks)
    if single is None:
        raise SettingError("blocks", blocks, f"the model has {len(divergences)} blocks")
    return {"blocks": single}
