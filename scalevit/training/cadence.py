"""When a run logs, evaluates and saves, as a function of the step. Knows integers only."""

from dataclasses import dataclass
from typing import NamedTuple


class Actions(NamedTuple):
    """What is done after an optimizer step."""

    log: bool
    evaluate: bool
    save: bool


@dataclass(frozen=True)
class Cadence:
    """All three happen after the last step, whatever their intervals are."""

    total_steps: int
    log_every_steps: int
    """A record is also written at the end of every epoch."""
    evaluate_every_epochs: int
    save_every_epochs: int | None = None
    save_every_steps: int | None = None

    def after(self, step: int, *, epochs_done: int | None) -> Actions:
        """What is done after a step.

        Args:
            step: optimizer steps done, with this one.
            epochs_done: how many epochs are complete, if this step completes one; else None.
        """
        last = step >= self.total_steps
        return Actions(
            log=last or epochs_done is not None or step % self.log_every_steps == 0,
            evaluate=last or _divides(self.evaluate_every_epochs, epochs_done),
            save=last or _divides(self.save_every_epochs, epochs_done) or _divides(self.save_every_steps, step),
        )


def _divides(interval: int | None, count: int | None) -> bool:
    return interval is not None and count is not None and count % interval == 0
