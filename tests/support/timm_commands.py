"""Conversions of timm's commands, with what timm knows of a ViT. No torch."""

from collections.abc import Iterator
from typing import Any

from scalevit.config.from_timm.arguments import read_arguments
from scalevit.config.from_timm.conversion import ModelFacts
from scalevit.config.from_timm.convert import Converted, convert
from scalevit.config.tree import Config
from scalevit.engines.settings import EngineSettings

VIT = "train.py --model vit_base_patch16_224"


class Timm:
    """Knows one model, and SGD's and Adam's arguments."""

    facts = ModelFacts(224, 1000, "bicubic", "center", 0.0)

    def model(self, name: str) -> ModelFacts:
        return self.facts

    def optimizer_arguments(self, name: str) -> frozenset[str]:
        return frozenset({"momentum"} if name == "sgd" else {"eps", "betas"})

    def engine(self, config: Config, processes: int) -> EngineSettings:
        return config.engine

    def check(self, config: Config, processes: int) -> None:
        """Takes everything."""


def converted(command: str, exact: bool = False, processes: int | None = None) -> Converted:
    return convert(read_arguments(command), exact=exact, processes=processes, timm=Timm())


def values(command: str, exact: bool = False) -> dict[str, Any]:
    """The settings of a command by their whole keys."""
    return dict(leaves(converted(command, exact).config.model_dump(mode="json")))


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
