"""What initial weights gave to a model and what not, for the banner and the record of a run."""

from dataclasses import dataclass

_SETS = {"weights": "of its weights without EMA", "ema": "of its EMA"}


@dataclass(frozen=True)
class Coverage:
    """What a weights file gives to a model, and what not."""

    tensors: int
    """Of the model, that are taken from the file."""
    already_reduced: bool
    """Whether they, and the model now, are reduced."""
    fresh: tuple[str, ...]
    """Names that keep their initialisation: a classifier that is missing or for another number of classes."""
    resampled: tuple[str, ...]
    """Names of position embeddings and patch filters that had another shape in the file."""
    unused: tuple[str, ...] = ()
    """Names in the file of what the model has no place for, such as the mask token of a pretraining."""
    separated: tuple[tuple[int, ...], ...] = ()
    """Blocks that share an MLP in the file: in this model each has its own copy of it."""
    weights_set: str | None = None
    """"weights" or "ema": the set that was taken, of a file with several."""

    def __str__(self) -> str:
        taken, whole = self.tensors, self.tensors + len(self.fresh)
        parts = [f"{taken} of {whole} tensors" if self.fresh else f"all {taken} tensors"]
        if self.weights_set is not None:
            parts[0] += f" {_SETS[self.weights_set]}"
        parts += [f"{_listed(names)} {what}" for names, what in self._others() if names]
        return "; ".join(parts)

    def _others(self) -> list[tuple[tuple[str, ...], str]]:
        groups = tuple("blocks " + ", ".join(map(str, group)) for group in self.separated)
        return [
            (self.fresh, "newly initialised"),
            (self.resampled, "resampled"),
            (self.unused, "of the file not used"),
            (groups, "shared an MLP, each has a copy now"),
        ]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
