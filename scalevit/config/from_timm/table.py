"""The one table of timm's options: every option of timm's train.py and of the paper's copy, and what becomes of it.

The parser of a command, the conversion, docs/from-timm.md and the tests read it. To support another option, change its
line here; one that has to be looked at together with others is `replaced`, and used in `rules`.
"""

from scalevit.config.from_timm.augmentation_options import AUGMENTATION_OPTIONS, NORM_OPTIONS
from scalevit.config.from_timm.model_options import DATA_OPTIONS, DEVICE_OPTIONS, MODEL_OPTIONS
from scalevit.config.from_timm.option import TimmOption
from scalevit.config.from_timm.other_options import (
    CONFIG_OPTIONS,
    DISTILLATION_OPTIONS,
    NAFLEX_OPTIONS,
    OTHER_OPTIONS,
    PAPER_OPTIONS,
    SIZE_OPTIONS,
)
from scalevit.config.from_timm.training_options import EMA_OPTIONS, OPTIMIZER_OPTIONS, SCHEDULE_OPTIONS

TIMM_VERSION = "1.0.29.dev0 (aa4b5850)"
"""The version and commit of the train.py whose options these are; installed packages of timm do not have it."""

GROUPS: dict[str, tuple[TimmOption, ...]] = {
    "Data set": DATA_OPTIONS,
    "Model": MODEL_OPTIONS,
    "Device": DEVICE_OPTIONS,
    "Optimizer": OPTIMIZER_OPTIONS,
    "Learning rate schedule": SCHEDULE_OPTIONS,
    "Augmentation, regularisation and loss": AUGMENTATION_OPTIONS,
    "Batch norm": NORM_OPTIONS,
    "Moving average of the weights": EMA_OPTIONS,
    "Logging, checkpoints and others": OTHER_OPTIONS,
    "Several image sizes": SIZE_OPTIONS,
    "NaFlex": NAFLEX_OPTIONS,
    "Distillation": DISTILLATION_OPTIONS,
    "Files of options": CONFIG_OPTIONS,
    "The paper's copy of train.py": PAPER_OPTIONS,
}
OPTIONS = {option.name: option for options in GROUPS.values() for option in options}
"""All of them by the name that they have in args.yaml."""
