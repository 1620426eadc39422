"""The teacher of a distillation: any model of timm by name, or a weights file, ours or a plain one.

Loaded on the CPU before any process group exists. Knows timm, models and weights files; must not know losses or
engines.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from scalevit.config.base import parse_section
from scalevit.config.loading import load_config
from scalevit.config.model import ModelConfig
from scalevit.data.transforms.base import Channels
from scalevit.data.transforms.grey import for_channels
from scalevit.errors import SettingError, UserError, nearest_hint
from scalevit.models.build import build_model, create_timm_model
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.apply import parse_reduction
from scalevit.models.weights.description import read_description
from scalevit.models.weights.hub import find_weights, is_address
from scalevit.models.weights.match import fitted, fitting_problem
from scalevit.models.weights.read import read_weights

if TYPE_CHECKING:
    from scalevit.config.tree import Config
    from scalevit.training.tasks.distillation.task import TeacherSettings


@dataclass(frozen=True)
class Teacher:
    """A model on the CPU, in evaluation mode."""

    module: Any
    name: str
    """Where it comes from, for people."""
    mean: Channels
    """That its images are normalised by, as `std`."""
    std: Channels

    @property
    def num_classes(self) -> int:
        return self.module.num_classes

    @cached_property
    def parameters(self) -> int:
        """Their number, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its tensors with their names, so of what it computes and not of the file that it was read from."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    @property
    def units(self) -> list[nn.Module]:
        """Parts that are sharded each on its own: blocks, or else stages and what else has modules inside."""
        found: list[nn.Module] = transformer_blocks(self.module)
        if found:
            return found
        for child in self.module.children():
            if isinstance(child, nn.Sequential | nn.ModuleList):
                found += child.children()
            elif next(child.children(), None) is not None:
                found.append(child)
        return [unit for unit in found if next(unit.parameters(), None) is not None]


def load_teacher(settings: "TeacherSettings", config: "Config", *, needs_classes: bool) -> Teacher:
    """Loads a teacher for images of a run's size.

    Args:
        settings: which one; `check_teacher` has found nothing wrong with them.
        config: of the run. A teacher without weights is initialised from its seed.
        needs_classes: whether the teacher must have as many classes as the student.

    Raises:
        SettingError: timm cannot build or load it, or it has other classes; names a field of the task.
        UserError: a file cannot be read or does not fit.
    """
    wanted = config.model.num_classes if needs_classes else None
    settings = _named(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        load = _from_our_file if settings.name is None else _from_timm
        module: Any = load(settings, config, wanted)
    channels = config.model.in_chans
    mean, std = (for_channels(values, channels) for values in _normalisation(settings, module.pretrained_cfg))
    teacher = Teacher(module.eval(), str(settings.weights or settings.name), mean, std)
    for side in config.data.augmentation.image_sizes or (config.model.image_size,):
        _check_images(teacher, settings, (channels, side, side))
    return teacher


def check_teacher(settings: "TeacherSettings") -> None:
    """Finds a name that timm does not know, or a file that is missing.

    Raises:
        SettingError: names a field of the task.
    """
    if settings.name is None and settings.weights is None:
        raise SettingError("teacher.name", None, "name a model of timm, or a file in task.teacher.weights")
    # A name with a prefix, like "hf-hub:timm/...", is looked up when it is loaded.
    if settings.name is not None and ":" not in settings.name and not timm.is_model(settings.name):
        hint = nearest_hint(settings.name, timm.list_models(), cutoff=0.3)
        raise SettingError("teacher.name", settings.name, f"is not a timm model{hint}")
    if settings.weights is None:
        return
    if is_address(settings.weights):
        raise SettingError("teacher.weights", settings.weights, "is an address: name it in task.teacher.name")
    try:
        find_weights(settings.weights)
    except UserError as error:
        reason = str(error).removeprefix(f"weights {settings.weights}: ")
        raise SettingError("teacher.weights", settings.weights, reason) from error


def _named(settings: "TeacherSettings") -> "TeacherSettings":
    """The settings with a folder of the Hugging Face form by its name of timm, which builds its model."""
    if settings.name is not None or not Path(str(settings.weights)).is_dir():
        return settings
    return settings.model_copy(update={"name": f"local-dir:{settings.weights}", "weights": None, "pretrained": True})


def feature_width(model: Any) -> int:
    """Features of a timm model before its classifier, as timm's FeatureDistillationTask finds them."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def pooled_features(model: Any, images: Tensor) -> Tensor:
    """images (b, 3, S, S) -> features before the classifier (b, D)."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def logits_and_features(model: Any, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """The forward of a student whose features are compared: images (b, 3, S, S) -> logits (b, classes), and in training
    its features (b, D), projected where it has a projection as `model.task`."""
    tokens = model.forward_features(images)
    logits = model.forward_head(tokens)
    if not model.training:
        return logits
    features = model.forward_head(tokens, pre_logits=True)
    return logits, model.task.projection(features) if hasattr(model, "task") else features


def renormalisation(
    student: tuple[Channels, Channels], teacher: tuple[Channels, Channels]
) -> tuple[Channels, Channels] | None:
    """What turns images that are normalised for one model into those for another: factors and summands by channel.

    Args:
        student: mean and standard deviation of the images as they are.
        teacher: those as they should be.

    Returns:
        None where they are the same.
    """
    if student == teacher:
        return None
    (mean, std), (other_mean, other_std) = student, teacher
    factors = [own / other for own, other in zip(std, other_std, strict=True)]
    summands = [(own - other) / by for own, other, by in zip(mean, other_mean, other_std, strict=True)]
    return tuple(factors), tuple(summands)


def _normalisation(settings: "TeacherSettings", timm_config: Any) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the teacher's images: as set, else of its run, else timm's for the model."""
    mean, std = settings.mean, settings.std
    if settings.name is None and (recorded := Path(str(settings.weights)).parent / "config.json").is_file():
        data = load_config(recorded).data
        mean, std = mean or data.mean, std or data.std
    return mean or tuple(timm_config["mean"]), std or tuple(timm_config["std"])


def _from_our_file(settings: "TeacherSettings", config: "Config", classes: int | None) -> nn.Module:
    """The model that a weights file of a run was made with.

    Args:
        classes: that it must have; None for any number.
    """
    assert settings.weights is not None, "check_teacher"
    metadata = read_description(Path(settings.weights))
    if "model" not in metadata:
        raise SettingError(
            "teacher.weights", settings.weights, "does not say of which model it is: name it in task.teacher.name"
        )
    try:
        model = parse_section(ModelConfig, metadata["model"])
        reduction = parse_reduction(metadata["reduction"])
        _check_classes(settings, model.num_classes, classes)
        changes = {"image_size": config.model.image_size, "drop_path": 0.0, "initial_weights": settings.weights}
        return build_model(model.model_copy(update=changes), reduction, seed=config.seed, need_classifier=True)
    except SettingError as error:
        if error.argument == "teacher":
            raise
        raise SettingError("teacher.weights", settings.weights, f"its model cannot be built ({error})") from error


def _from_timm(settings: "TeacherSettings", config: "Config", classes: int | None) -> nn.Module:
    """A model of timm's registry or hub, with its pretrained weights or those of a file; arguments as above."""
    arguments = _sized(settings, config)
    with torch.device("meta"):
        shapes = _create(settings, "cannot be built with these arguments", **arguments)
    if settings.weights is None:
        # Pretrained weights for another number of classes leave a classifier that is initialised.
        found = shapes.pretrained_cfg["num_classes"] if settings.pretrained else shapes.num_classes
        _check_classes(settings, found, classes)
        if classes is not None and shapes.num_classes != found:
            reason = (
                f"its weights have {found} classes, but it is built with {shapes.num_classes}: leave num_classes out"
            )
            raise SettingError("teacher.name", settings.name, reason)
        problem = "its pretrained weights cannot be loaded: name a file in task.teacher.weights"
        return _create(settings, problem, pretrained=settings.pretrained, **arguments)
    path = Path(settings.weights)
    if "model" in read_description(path):
        raise SettingError("teacher.name", settings.name, f"{path} says of which model it is: leave the name out")
    tensors = read_weights(path).tensors
    held = _classes_in(tensors, shapes.pretrained_cfg.get("classifier")) or shapes.num_classes
    _check_classes(settings, held, classes)
    # timm converts names, and resamples position embeddings, as for pretrained weights of its own.
    overlay = {"state_dict": tensors, "num_classes": held, "label_offset": 0, "custom_load": False, "source": ""}
    arguments |= {"num_classes": held, "pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        return _create(settings, f"does not take the weights {path}", **arguments)
    except SettingError as error:
        with torch.device("meta"):
            model = _create(settings, "cannot be built", **{**arguments, "pretrained": False})
        differing = fitting_problem(fitted(tensors, model), model)
        if differing is None:
            raise
        reason = f"{path} {differing}: set task.teacher.kwargs for its model"
        raise SettingError("teacher.name", settings.name, reason) from error


def _check_classes(settings: "TeacherSettings", found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise SettingError(
            "teacher",
            settings.weights or settings.name,
            f"has {found} classes, but model.num_classes = {wanted} (only task.method = features needs no classes)",
        )


def _sized(settings: "TeacherSettings", config: "Config") -> dict[str, Any]:
    """The arguments of timm's factory, with the image size for models that are built for another."""
    name = str(settings.name)
    own = None if ":" in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
    side = config.model.image_size
    fits = own is not None and (not own.fixed_input_size or own.input_size[-1] == side)
    return {**({} if fits else {"img_size": side}), **settings.kwargs}


def _create(settings: "TeacherSettings", problem: str, **arguments: Any) -> Any:
    try:
        return create_timm_model(str(settings.name), arguments)[0]
    except Exception as error:  # of any kind: constructors, the hub's client and state dicts fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SettingError("teacher.name", settings.name, f"{problem} ({reason})") from error


def _classes_in(tensors: dict[str, Tensor], classifiers: Any) -> int | None:
    """Outputs of the first classifier that a state dict holds under timm's name of it."""
    names = [classifiers] if isinstance(classifiers, str) else list(classifiers or ())
    found = [tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors]
    return len(found[0]) if found else None


def _check_images(teacher: Teacher, settings: "TeacherSettings", shape: tuple[int, int, int]) -> None:
    """Runs the teacher on an image of the student's shape (channels, height, width)."""
    try:
        with torch.no_grad():
            pooled_features(teacher.module, torch.zeros(1, *shape))
    except Exception as error:  # of any kind: models check the size in their own ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        key, value = ("weights", settings.weights) if settings.name is None else ("name", settings.name)
        is_of_rgb = settings.name is not None and shape[0] == 1 and "in_chans" not in settings.kwargs
        hint = ": set task.teacher.kwargs.in_chans=1" if is_of_rgb else ""
        raise SettingError(
            f"teacher.{key}", value, f"cannot take images of {' x '.join(map(str, shape))} ({reason}){hint}"
        ) from error
