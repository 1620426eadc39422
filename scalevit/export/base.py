"""The seam of exporters: one form in which a trained model is written for other tools, and read back.

Knows models and settings. Must not know where the model comes from: `read_model` reads it. Like exporters it imports no
torch at module level, so that a mistake in the arguments is reported at once.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalevit.config.model import ModelConfig
from scalevit.errors import UserError
from scalevit.files import check_new
from scalevit.models.reductions.base import Reduction

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Logits = Callable[[Tensor], Tensor]
    """Normalised images (b, 3, S, S), float32 -> logits (b, classes)."""

Channels = tuple[float, ...]
"""A value per input channel: three (RGB) or one (grey)."""


CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")
MAX_IMAGE_SIZE = 8192
"""Of an export that is read: a larger one would fill the memory."""


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before the model sees it."""

    image_size: int
    """Side of the input in pixels."""
    crop_pct: float
    """Central crop over resized side."""
    interpolation: str
    """Of the resize: "bicubic", "bilinear"."""
    mean: Channels
    """Of the normalisation, for values in 0..1."""
    std: Channels
    crop_mode: str = "center"
    """Whether the shortest side (center), both sides (squash) or the longest side (border) are resized; as timm's."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one image: channels, height, width."""
        return len(self.mean), self.image_size, self.image_size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the values are not such settings.
        """
        mean, std = (tuple(float(value) for value in values[key]) for key in ("mean", "std"))
        if not len(mean) == len(std) or len(mean) not in (1, 3):
            raise ValueError("mean and std must have three values (RGB images) or one (grey ones)")
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(f"mean = {list(mean)}, std = {list(std)}: must be finite, and std above 0")
        own = cls(
            image_size=int(values["image_size"]),
            crop_pct=float(values["crop_pct"]),
            interpolation=str(values["interpolation"]),
            mean=mean,
            std=std,
            crop_mode=str(values.get("crop_mode", "center")),
        )
        if not 1 <= own.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size = {own.image_size} must be 1 to {MAX_IMAGE_SIZE}")
        if not 0 < own.crop_pct <= 1:
            raise ValueError(f"crop_pct = {own.crop_pct} must be above 0 and at most 1")
        if own.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode = {own.crop_mode!r} must be one of {', '.join(CROP_MODES)}")
        if own.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation = {own.interpolation!r} must be one of {', '.join(INTERPOLATIONS)}")
        return own


@dataclass(frozen=True)
class ModelDescription:
    """What a model's tensors do not say."""

    model: ModelConfig
    reduction: Reduction
    """Applied already: the model is the reduced one."""
    tied: Mapping[str, str]
    """Further name -> canonical name of each shared parameter."""
    preprocessing: Preprocessing
    classes: Sequence[str] | None = None
    """Names of the classifier's first outputs, if they are known."""

    @property
    def label_names(self) -> list[str] | None:
        """Names of all outputs; None where one has no name."""
        return None if self.classes is None or len(self.classes) != self.model.num_classes else list(self.classes)


@dataclass(frozen=True)
class Exported:
    """An export, read back as another tool reads it: ready to classify images."""

    logits: "Logits"
    preprocessing: Preprocessing
    num_classes: int
    classes: Sequence[str] | None = None
    """Names of the outputs, where the export has them."""

    def checked(self, device: "torch.device") -> "Exported":
        """Itself, once an image of the size that it states has given the outputs that it states.

        Raises:
            ValueError: it has other outputs. Also what the model raises for an image of another size than its own.
        """
        import torch

        with torch.no_grad():
            found = self.logits(torch.zeros(1, *self.preprocessing.input_shape, device=device))
        if found.shape != (1, self.num_classes):
            raise ValueError(f"its model has {found.shape[-1]} classes, but num_classes = {self.num_classes}")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"has names of {len(self.classes)} classes, but num_classes = {self.num_classes}")
        return self


class Exporter(abc.ABC):
    """Writes a model in one form. `scalevit export --to NAME` finds it in `EXPORTERS`."""

    name: str
    """The value of `--to`."""
    suffix: str
    """Of the file that it writes, with the dot; "" for a folder."""
    purpose: str
    """What reads the form, in a few words, for help."""
    can_tie: bool = False
    """Whether it can write shared tensors once."""

    def check_target(self, target: Path) -> None:
        """Makes sure that an export can be written there. Imports no torch.

        Raises:
            UserError: it exists, its folder does not or cannot be written, or its name has another suffix than the
                form.
        """
        if self.suffix and target.suffix != self.suffix:
            raise UserError(f"{target}: --to {self.name} writes a {self.suffix} file: name it so")
        for path in self.files(target):
            check_new(path, folder=not self.suffix)

    def files(self, target: Path) -> list[Path]:
        """The target and what is written beside it."""
        return [target]

    def check(self) -> None:  # noqa: B027 (most need nothing)
        """Makes sure that the packages that it needs are installed.

        Raises:
            UserError: one is missing.
        """

    @abc.abstractmethod
    def write(self, model: "nn.Module", description: ModelDescription, target: Path, *, tied: bool) -> None:
        """Writes the target and the other `files`.

        Args:
            model: on the CPU, in evaluation mode, with PyTorch's own modules for its MLPs.
            target: in an empty folder, from which it is moved when it has been verified.
            tied: write shared tensors once (only where `can_tie`).

        Raises:
            UserError: the form cannot hold this model.
            OSError: it cannot be written.
        """

    def logits(self, target: Path, model: "nn.Module") -> "Logits":
        """The export as another tool computes it, on the CPU; compared with the model before it is published.

        Args:
            target: as written.
            model: that was written.
        """
        import torch

        return self.read(target, torch.device("cpu")).logits

    def usage(self, target: Path) -> str:
        """How another tool loads the export: lines of code; "" if there is nothing to say."""
        return ""

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder has this form and `read` reads it. Imports no torch."""
        return False

    def read(self, path: Path, device: "torch.device") -> Exported:
        """Reads an export. Executes nothing that it contains but the model's operations.

        Raises:
            UserError: it cannot be read, or contains something else.
        """
        raise NotImplementedError
