"""What a run leaves behind: `runs/NAME/` with its config, environment, metrics and summary, and wandb beside it.

Only rank 0 holds a `RunFolder` that writes. Knows files and JSON; must not know models, engines or data.
"""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scalevit.config.tree import Config
from scalevit.errors import UserError
from scalevit.files import write_whole

_PACKAGES = (
    "scalevit",
    "torch",
    "torchvision",
    "triton",
    "timm",
    "deepspeed",
    "webdataset",
    "wandb",
    "numpy",
    "pillow",
)


class RunFolder:
    """One run's folder; on ranks other than the first it reads only."""

    def __init__(self, config: Config, *, writes: bool):
        self.config = config
        self.path = Path(config.output_dir) / config.name
        self.writes = writes
        self._wandb: Any = None
        self._metrics = self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, environment: Mapping[str, Any], *, step: int, wandb_id: str | None) -> str | None:
        """Writes config and environment, and cuts metrics that a resumed run will write again.

        Args:
            step: the optimizer step that the run goes on from; 0 for a new one.
            wandb_id: of the wandb run to go on with.

        Returns:
            The wandb run's id, or None.

        Raises:
            UserError: the folder cannot be written.
        """
        if not self.writes:
            return wandb_id
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_json("config.json", self.config.model_dump(mode="json"))
            self._write_json("environment.json", environment)
            self._cut_metrics(step)
        except OSError as error:
            raise UserError(f"run folder {self.path}: cannot be written ({error.strerror})") from None
        return self._start_wandb(wandb_id)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl, and its numbers to wandb."""
        if not self.writes:
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n")
        if self._wandb is not None:
            kind = record["kind"]
            numbers = {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            self._wandb.log(numbers, step=record["step"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json and closes wandb."""
        if not self.writes:
            return
        self._write_json("summary.json", summary)
        if self._wandb is not None:
            self._wandb.summary.update(summary)
            self.close()

    def close(self) -> None:
        """Ends the wandb run, if there is one."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    # --- helpers --------------------------------------------------------------------------------------------

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def _cut_metrics(self, step: int) -> None:
        (self.path / "summary.json").unlink(missing_ok=True)
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that a killed run was writing
            if record["step"] <= step:
                kept.append(line)
        write_whole(self._metrics, "".join(kept).encode())  # a run that is killed here loses nothing

    def _start_wandb(self, wandb_id: str | None) -> str | None:
        settings: Any = self.config.tracking.wandb  # type: ignore[attr-defined]
        if not settings.enabled:
            return wandb_id
        import wandb

        try:
            self._wandb = wandb.init(
                project=settings.project,
                entity=settings.entity,
                tags=settings.tags,
                name=self.config.name,
                id=wandb_id,
                resume="allow",
                mode=settings.mode,
                dir=str(self.path),
                config=self.config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"wandb: {reason}; or set tracking.wandb.mode=offline or tracking.wandb.enabled=false"
            ) from None
        return self._wandb.id


def describe_environment(world_size: int, device: str) -> dict[str, Any]:
    """Versions, machine and command: what a reader needs to judge or repeat the run's numbers."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "device": device,
        "world_size": world_size,
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit that this file was run from, with a + where files differ from it; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails where this is an installed copy inside another checkout
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
