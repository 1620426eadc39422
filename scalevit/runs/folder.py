"""The folder of a run: `runs/NAME/` with its config, environment, summary, checkpoints and weights.

Only rank 0 writes. Knows files and JSON; must not know what they describe. metrics.jsonl is written by
`trackers.jsonl_tracker`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalevit.errors import UserError
from scalevit.files import write_whole


class RunFolder:
    """The folder of one run; on ranks other than the first it is only read."""

    def __init__(self, path: Path, *, writes: bool):
        """
        Args:
            path: of the folder, which need not exist.
            writes: whether this process writes it (rank 0).
        """
        self.path, self.writes = path, writes

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def data_faults(self) -> Path:
        return self.path / "data_faults.jsonl"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def weights(self, name: str) -> Path:
        """A weights file, for example "best_ema"."""
        return self.path / f"{name}.safetensors"

    def open(
        self,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        *,
        classes: Sequence[str] | None = None,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Creates the folder with config.json, environment.json and classes.json; removes an earlier summary.

        Args:
            config: whole, plain JSON values.
            environment: versions and machine.
            classes: names of labels 0...; without them there is no classes.json.
            changes: of settings when the run was resumed; config.json keeps them in its note "about".

        Raises:
            UserError: the folder cannot be written.
        """
        if not self.writes:
            return
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_json("config.json", {"about": {"changes": changes}, **config} if changes else config)
            self._write_json("environment.json", environment)
            if classes is not None:
                self._write_json("classes.json", list(classes))
            (self.path / "summary.json").unlink(missing_ok=True)

    def read_micro_batch(self, conditions: Mapping[str, Any]) -> int | None:
        """What `write_micro_batch` has recorded under the same conditions; None if there is no such record."""
        try:
            recorded = json.loads((self.path / "micro_batch.json").read_text())
            size = recorded["micro_batch"] if recorded["conditions"] == json.loads(json.dumps(conditions)) else None
        except (OSError, ValueError, LookupError, TypeError):
            return None  # it is found anew
        return size if type(size) is int and size > 0 else None

    def write_micro_batch(self, conditions: Mapping[str, Any], size: int) -> None:
        """Records the micro-batch that was found to fit.

        Args:
            conditions: what it depends on, in JSON's types.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.writes:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                self._write_json("micro_batch.json", {"micro_batch": size, "conditions": conditions})

    def write_predictions(self, predictions: Mapping[str, Any]) -> None:
        """Writes predictions.json, for the run's page.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.writes:
            with self._writing():
                write_whole(self.path / "predictions.json", json.dumps(predictions).encode(), durable=False)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.writes:
            with self._writing():
                self._write_json("summary.json", summary)

    def _write_json(self, name: str, content: Any) -> None:
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run folder {self.path}: cannot be written ({error.strerror or error})") from None
