"""Parameter reductions, one file each. A new one is its file and one line here."""

from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.none import NoReduction
from scalevit.models.reductions.shallow import ShallowReduction
from scalevit.models.reductions.thin import ThinReduction

NO_REDUCTION = NoReduction()
"""Leaves the model as timm builds it."""

REDUCTIONS = (NoReduction, GroupedReduction, ShallowReduction, ThinReduction)
