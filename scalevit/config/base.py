"""What every section of the config is made of: strict, frozen settings, and Parts, which are settings with behaviour.

Knows only pydantic. Must not import torch or another room, so that a config is checked in milliseconds.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalevit.errors import SettingError

UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
FilePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
CompileMode = Literal["default", "max-autotune-no-cudagraphs"]
SelectionMetric = Literal["top1", "top5", "loss"]
ClipMode = Literal["norm", "value", "agc"]
Precision = Literal["bf16", "fp16", "fp32", "bf16-weights"]
"""Of the computation in training; the weights stay fp32, but for the last, where they are bf16 too."""
MatmulPrecision = Literal["highest", "high", "medium"]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values never change, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


AnySection = TypeVar("AnySection", bound=Section)


class Part(Section):
    """A section of which there are several kinds, each with the behaviour that it selects.

    A Part is one file: the settings as fields, the behaviour as the methods of its seam's base class (`Reduction`,
    `Loss`, `Task`, `EngineSettings`, `Tracker`). It imports nothing heavy at module level; methods import what they
    need. The seam's `__init__.py` lists its Parts in a tuple, which config, CLI, planner, benchmarks and docs read.
    """

    @classmethod
    def kind(cls) -> str:
        """The value that selects this Part, e.g. "grouped": the default of its first field."""
        return str(next(iter(cls.model_fields.values())).default)


def one_of(parts: tuple[type[Part], ...]) -> Any:
    """The type of a section that is one of these Parts; the first field of each names it (`strategy`, `name`)."""
    keys = {next(iter(part.model_fields)) for part in parts}
    assert len(keys) == 1, f"the Parts of a seam are told apart by one key, not by {sorted(keys)}"
    union: Any = parts[0]
    for part in parts[1:]:
        union = union | part
    return Annotated[union, Field(discriminator=keys.pop())]


def parse_section(section: type[AnySection], settings: Mapping[str, Any]) -> AnySection:
    """A section from plain values, for code that is called from Python and not with a config.

    Raises:
        SettingError: an unknown setting or an impossible value; names the first one.
    """
    try:
        return section.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or section.__name__
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(section.model_fields)
            raise SettingError(key, first["input"], f"unknown setting; allowed: {allowed}") from None
        raise SettingError(key, first["input"], first["msg"].removeprefix("Value error, ")) from None
