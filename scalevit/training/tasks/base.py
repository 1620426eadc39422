"""The seam of tasks: what is computed for a micro-batch. Must not import torch at module level."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from scalevit.config.base import Part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scalevit.config.model import KernelsConfig
    from scalevit.config.tree import Config
    from scalevit.data.transforms.mixing import MixedLabels
    from scalevit.distributed import World

Forward = Callable[["Tensor"], Any]
"""images (b, 3, S, S) -> logits (b, classes), or what `TaskRunner.extend` has the model return: the engine's model."""
Form = Callable[[], AbstractContextManager[None]]
"""A block in which a model is evaluated in one of its forms."""
OWN_PARAMETERS = "task."
"""Names of the parameters that a task trains and that are no part of the model begin with it."""

_Value = TypeVar("_Value")


class DeviceBatch(NamedTuple):
    """A micro-batch on its device, after normalisation, erasing and mixing. It has b images: rows times views."""

    images: "Tensor"
    """(b, 3, S, S) float32."""
    labels: "MixedLabels"
    weights: "Tensor"
    """(b,) float32: 1 for an image, 0 for a row that only fills up the batch. The views of a row share its weight."""
    step: int
    """Number of the optimizer step, from 0: what a task draws follows from it and the seed, and is the same on every
    rank and for every micro-batch."""


class TaskLoss(NamedTuple):
    """The loss of one forward pass."""

    total: "Tensor"
    """Scalar, the sum over the images of the micro-batch, each times its weight; what is differentiated. The training
    step divides it by the images of the global batch."""
    parts: "Mapping[str, Tensor]" = {}
    """Likewise sums, that are logged as `loss_NAME`, for example the terms of `total`."""


class TaskRunner:
    """A task that is ready to run, with what it needs besides the model, for example a teacher."""

    passes: int = 1
    """Forward and backward passes of a micro-batch. Their gradients, and their losses in the log, are added up."""
    summary: str | None = None
    """A line for the banner of the run."""
    fingerprint: Mapping[str, str] = {}
    """What the results depend on and no setting says, for example a teacher's digest: kept in checkpoints, and compared
    when a run resumes."""

    def extend(self, model: "nn.Module") -> None:
        """Changes the model before an engine takes it over, in place.

        Modules that are trained with the model and are no part of it are added as `model.task`, on the CPU with their
        initial values: checkpoints have them, weights files do not. In evaluation mode the model must return logits.

        Raises:
            SettingError: the task does not fit the model, by the name of its field.
        """

    def start(self, model: "nn.Module") -> None:
        """Called when an engine has taken the model over, before the first pass. Collective.

        Args:
            model: the module that was extended, inside the engine.
        """

    def loss(self, forward: Forward, batch: DeviceBatch, index: int) -> TaskLoss:
        """One forward pass and its loss.

        Args:
            forward: the model.
            batch: the micro-batch, the same one in every pass.
            index: number of the pass, 0 to `passes` - 1.

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError


class Task(Part):
    """What a run trains for; `name` names the kind. It owns the forward passes of a micro-batch and their loss."""

    name: str

    @property
    def not_estimated(self) -> list[str]:
        """Names of the settings whose effect `scalevit plan` leaves out."""
        return []

    def check(self) -> None:
        """Finds settings that cannot work, the cheap way. Must not load or download anything.

        Raises:
            SettingError: a setting, by the name of its field.
        """

    def build(self, config: "Config", world: "World") -> TaskRunner:
        """Loads what the task needs besides the model, on the CPU. Called before any process group exists.

        Args:
            config: of the run, with the model's defaults filled in.
            world: its ranks.

        Raises:
            SettingError: a setting does not fit the run, by the name of its field.
            UserError: something cannot be loaded.
            NotImplementedError: by this base class.
        """
        raise NotImplementedError

    def adapt(self, model: "nn.Module", kernels: "KernelsConfig") -> None:
        """Changes how a model computes, but not its parameters, in place: for training, and for evaluations.

        Args:
            model: as `build_model` returns it.
            kernels: how its MLPs are computed.

        Raises:
            SettingError: the task does not fit the model, by the name of its field.
        """

    def forms(self, model: "nn.Module") -> Mapping[str, Form]:
        """The forms in which a model is evaluated, by the suffix of their metrics; "" is the one that is selected by.

        Args:
            model: after `adapt`, perhaps inside an engine.
        """
        return {"": nullcontext}


def without_own(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """What belongs to the model, of values by the name of a parameter."""
    return {name: value for name, value in values.items() if not name.startswith(OWN_PARAMETERS)}
