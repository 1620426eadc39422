"""What a checkpoint contains and whether it is intact, as data. Must not print."""

from pathlib import Path
from typing import Any

import torch

from scalevit.checkpoint.folder import find_damage, read_record
from scalevit.errors import UserError


def describe(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint contains, and the damage of its files."""
    paths = list(checkpoint.iterdir())
    about: dict[str, Any] = {
        "path": str(checkpoint),
        "bytes": sum(path.lstat().st_size for path in paths),
        "files": len(paths),
        "damage": find_damage(checkpoint),
    }
    try:
        record = read_record(checkpoint)
    except UserError:
        return about  # the damage says why
    config = record["config"]
    return about | {
        "step": record["state"]["step"],
        "evaluated_epochs": len(record["state"]["epochs"]),
        "top1": record["score"],
        "name": config["name"],
        "model": config["model"]["name"],
        "reduction": config["reduction"]["strategy"],
        "parameters": sum(torch.Size(shape).numel() for shape in record["tensors"].values()),
        "tied_names": len(record["tied"]),
        "parts": record["parts"],
        "optimizer": record["optimizer"]["name"],
        "optimizer_scalars": {entry["name"]: entry["value"] for entry in record["optimizer"]["scalars"]},
        "engine": config["engine"],
        "world_size": record["world_size"],
        "precision": config["train"]["precision"],
        "loss_scale": record["loss_scale"]["value"] if record["loss_scale"]["enabled"] else None,
        "data": record["data"],
        "versions": record["versions"],
    }
