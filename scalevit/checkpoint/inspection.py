"""The tables of `scalevit checkpoint inspect`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from scalevit.checkpoint.folder import find_damage, read_record
from scalevit.errors import UserError
from scalevit.terminal import print_table


def describe(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint is, and what is wrong with its files."""
    about: dict[str, Any] = {
        "path": str(checkpoint),
        "bytes": sum(path.lstat().st_size for path in checkpoint.iterdir()),
        "files": len(list(checkpoint.iterdir())),
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
        "optimizer_steps": record["optimizer_steps"],
        "engine": config["engine"],
        "world_size": record["world_size"],
        "precision": config["train"]["precision"],
        "loss_scale": record["loss_scale"]["value"] if record["loss_scale"]["enabled"] else None,
        "data": record["data"],
        "versions": record["versions"],
    }


def print_one(about: dict[str, Any]) -> None:
    """All of one checkpoint, a row each."""
    table = Table(title=about["path"], show_header=False)
    engine = about.get("engine", {})
    rows = {
        "run": about.get("name"),
        "step": _number(about.get("step")),
        "optimizer steps": _number(about.get("optimizer_steps")),
        "top-1 here": _percent(about.get("top1")),
        "model": f"{about['model']}, {about['reduction']}" if "model" in about else None,
        "parameters": _number(about.get("parameters")),
        "tied names": _number(about.get("tied_names")),
        "tensors": ", ".join(about.get("parts", [])),
        "written by": f"{engine.get('name')}, world size {about.get('world_size')}, {about.get('precision')}",
        "loss scale": _number(about.get("loss_scale")),
        "size": _size(about),
        "versions": ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()),
        "files": "whole, checksums agree" if not about["damage"] else "damaged: " + "; ".join(about["damage"]),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    print_table(table)


def print_many(checkpoints: Sequence[dict[str, Any]]) -> None:
    """One row for each checkpoint of a run."""
    table = Table(title=str(Path(checkpoints[0]["path"]).parent))
    for column in ("step", "top-1", "parameters", "size", "files"):
        table.add_column(column, justify="left" if column == "files" else "right")
    for about in checkpoints:
        state = "whole" if not about["damage"] else f"damaged: {about['damage'][0]}"
        table.add_row(
            _number(about.get("step")) or Path(about["path"]).name,
            _percent(about.get("top1")),
            _number(about.get("parameters")),
            _size(about),
            state,
        )
    print_table(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _size(about: dict[str, Any]) -> str:
    return f"{about['bytes'] / 1e6:,.1f} MB in {about['files']} files"
