"""How the MLPs of a reduced model come from those of a trained one: settings of `fit`. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

SharedMlp = Literal["first", "mean"]
KeptUnits = Literal["first", "weights", "activations"]


@dataclass(frozen=True)
class FitMethod:
    """The defaults did best after fine-tuning on the sets of docs/results/reducing.json, on which they were chosen."""

    shared: SharedMlp = "mean"
    """What blocks that share an MLP start from: that of the first of them, or the mean of all, hidden units matched."""
    units: KeptUnits = "activations"
    """Which hidden units a narrower MLP keeps: the first; those of the largest weights (`MlpView.importance`); or those
    of the largest mean |activation| times the norm of their fc2 column, over the calibration images."""
    refit: bool = True
    """Whether fc2 is then fitted by least squares to what the trained model's MLPs return."""
    ridge: float = 0.1
    """Of that fit, see `least_squares.refitted`. Smaller ones fit more closely, by weights that grow many times larger
    and are harder to fine-tune."""
