"""What `scalevit evaluate` and `scalevit predict` are given: a run folder or a weights file, with the run's config."""

import json
from pathlib import Path

from scalevit.config.loading import load_config
from scalevit.config.tree import Config
from scalevit.errors import UserError
from scalevit.runs.records import read_records
from scalevit.runs.summary import is_ema_best

# Of a run folder, the first that exists; the two of either kind change places where the plain weights were better.
_FILES = ("best_ema.safetensors", "best.safetensors", "final_ema.safetensors", "final.safetensors")


def config_of_target(target: str, config: str | None, overrides: list[str]) -> Config:
    """The config with the target's weights in `model.initial_weights`.

    Args:
        target: a run folder, whose best weights are taken, or a weights file.
        config: as given by `--config`; None takes the config.json in the folder or beside the file.
        overrides: of its settings.

    Raises:
        UserError: there are no weights, or no config.
    """
    path = Path(target)
    folder = path if path.is_dir() else path.parent
    weights = _best_weights(path) if path.is_dir() else path
    if not weights.is_file():
        raise UserError(f"weights {weights}: no such file")
    recorded = folder / "config.json"
    if config is None and not recorded.is_file():
        raise UserError(f"{weights}: there is no config.json beside it: give --config")
    own = ["model.pretrained=false", 'model.initial_weights_set="auto"']  # of what the run started from
    return load_config(config or recorded, [*own, *overrides, f"model.initial_weights={json.dumps(str(weights))}"])


def _best_weights(folder: Path) -> Path:
    """The file of the best evaluation in metrics.jsonl: of the EMA, or of the plain weights if they were better."""
    records, _ = read_records(folder / "metrics.jsonl")
    names = _FILES if is_ema_best(records) else (_FILES[1], _FILES[0], _FILES[3], _FILES[2])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"run folder {folder}: has none of {', '.join(_FILES)}")
