"""The cells of the engine tests, how they are run, and how far they are from plain PyTorch.

A cell is a dict that `parity_worker` runs. As a script this runs the full parity matrix and the count of bytes and
writes both down (about 5 minutes on 2 cores):

    python tests/engines/cells.py --output docs/results
"""

import argparse
import csv
import itertools
import json
import sys
import tempfile
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import parity_worker
from launching import Ranks
from scalevit.runs.environment import describe_environment

Cell = dict[str, Any]
Results = dict[str, dict[str, Any]]

SECONDS = 3600  # for all cells of one world size
ENGINES = {
    "zero0": ["engine.stage=0"],
    "zero1": ["engine.stage=1"],
    "zero2": ["engine.stage=2"],
    "zero3": ["engine.stage=3"],
    "fsdp": ["engine.name=fsdp"],
    "hsdp": ["engine.name=fsdp"],
}
# HSDP: replicas of a copy on one rank, or at 4 ranks of two copies on two ranks each.
SHARD_SIZE = {1: 1, 2: 1, 4: 2}
FACTORS: dict[str, tuple[Any, ...]] = {
    "engine": tuple(ENGINES),
    "ranks": (1, 2, 4),
    "reduction": ("baseline", "grouped", "shallow"),
    "accumulation": (1, 3),
    "checkpointing": (False, True),
}


def cell(engine: str, ranks: int, reduction: str = "grouped", accumulation: int = 1, **changes: Any) -> Cell:
    """`changes` are keys of a cell, and `more`: settings beside the engine's."""
    settings = ENGINES[engine] + changes.pop("more", [])
    if engine == "hsdp":
        settings = [*settings, f"engine.shard_size={SHARD_SIZE[ranks]}"]
    made = {"ranks": ranks, "engine": engine, "reduction": reduction, "accumulation": accumulation, **changes}
    identity = "-".join(f"{key}={value}" if key in changes else str(value) for key, value in made.items())
    named = "+".join(
        setting.partition("=")[0].rpartition(".")[2] + "=" + setting.partition("=")[2]
        for setting in settings[len(ENGINES[engine]) :]
    )
    return {**made, "settings": settings, "id": f"{identity}-{named}".rstrip("-")}


def full_matrix() -> list[Cell]:
    return [cell(**dict(zip(FACTORS, values, strict=True))) for values in itertools.product(*FACTORS.values())]


def pairwise(cells: list[Cell]) -> list[Cell]:
    """A few of the cells, in which every two values of two factors still meet. Greedy, always the same."""

    def pairs(one: Cell) -> set[Any]:
        return set(itertools.combinations([(factor, one[factor]) for factor in FACTORS], 2))

    chosen: list[Cell] = []
    missing = set().union(*map(pairs, cells))
    while missing:
        # The world's size before the rest: four ranks on a small machine take the longest.
        best = max(cells, key=lambda one: (len(pairs(one) & missing), -one["ranks"]))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def run_cells(cells: list[Cell], folder: Path) -> Results:
    """Results of cells by their id; one group of processes for each number of ranks.

    Raises:
        AssertionError: a rank failed, with what it said.
    """
    results: Results = {}
    for ranks in sorted({one["ranks"] for one in cells}):
        results |= _run_ranks(ranks, [one for one in cells if one["ranks"] == ranks], folder)
    return results


def _run_ranks(ranks: int, cells: list[Cell], folder: Path) -> Results:
    listed, result = folder / f"cells{ranks}.json", folder / f"results{ranks}.pt"
    listed.write_text(json.dumps(cells))
    Ranks(ranks, parity_worker.__file__, listed, result, log=folder / f"{ranks}.log").wait(SECONDS)
    return torch.load(result, weights_only=False)


def expected_of(one: Cell, skipped: int = 0) -> dict[str, Any]:
    """The same training in one process of plain PyTorch."""
    steps = one.get("steps", parity_worker.STEPS)
    micro_batches = one["ranks"] * one["accumulation"]
    return parity_worker.reference(
        one["reduction"],
        micro_batches,
        one.get("clip"),
        steps,
        skipped,
        one.get("depth", 4),
        one.get("optimizer", "adamw"),
        tuple(one.get("frozen", ())),
        one.get("clip_mode", "norm"),
    )


def deviations(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative deviations: of a step's loss, of a step's gradient norm, and of a final parameter.

    A parameter's is the L2 norm of the difference over its L2 norm: single elements near zero have no relative error
    that means anything.
    """
    assert ours["weights"].keys() == expected["weights"].keys(), "unique parameters under their canonical names"
    return {
        "loss": _largest_difference(ours["losses"], expected["losses"]),
        "grad_norm": _largest_difference(ours["norms"], expected["norms"]),
        "parameter": max(
            ((ours["weights"][name] - tensor).norm() / tensor.norm()).item()
            for name, tensor in expected["weights"].items()
        ),
    }


def _largest_difference(ours: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))


# --- bytes --------------------------------------------------------------------------------------------------

WIRE_ENGINES = {
    # Small parameters stay gathered on each rank by default: all of this small model's.
    "zero1": [],
    "zero2": [],
    "zero3": ["engine.native.zero_optimization.stage3_param_persistence_threshold=0"],
    "fsdp": [],
}


def wire_cells() -> list[Cell]:
    """baseline and grouped on each engine, two ranks, with the collectives of the third step counted."""
    return [
        cell(engine, 2, reduction, count=True, steps=3, width=96, more=more)
        for engine, more in WIRE_ENGINES.items()
        for reduction in ("baseline", "grouped")
    ]


def wire_row(engine: str, cells: list[Cell], results: Results) -> dict[str, Any]:
    """Bytes that a rank sends in one step, and the ratio to the baseline's beside that of the parameters."""
    by_reduction = {one["reduction"]: results[one["id"]] for one in cells if one["engine"] == engine}
    sent = {name: sum(kind["bytes"] for kind in result["wire"].values()) for name, result in by_reduction.items()}
    parameters = {name: result["parameters"] for name, result in by_reduction.items()}
    return {
        "engine": engine,
        "bytes_per_step": sent,
        "parameters": parameters,
        "bytes_ratio": sent["grouped"] / sent["baseline"],
        "parameter_ratio": parameters["grouped"] / parameters["baseline"],
        "collectives": {name: result["wire"] for name, result in by_reduction.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    output = parser.parse_args().output
    about = {
        "date": date.today().isoformat(),
        **describe_environment(4, "cpu"),
    }
    with tempfile.TemporaryDirectory() as folder:
        cells, wire = full_matrix(), wire_cells()

        def run(ranks: int) -> Results:
            return run_cells([one for one in cells + wire if one["ranks"] == ranks], Path(folder))

        with ThreadPoolExecutor() as side_by_side:
            results = dict(ChainMap(*side_by_side.map(run, FACTORS["ranks"])))
    rows = [
        {
            **{factor: one[factor] for factor in FACTORS},
            **{f"{key}_deviation": value for key, value in deviations(results[one["id"]], expected_of(one)).items()},
        }
        for one in cells
    ]
    notes = "largest relative deviations from one process of plain PyTorch after 20 steps in fp32; see deviations()"
    _write_json(output / "parity_matrix.json", {**about, "what": notes, "cells": rows})
    with (output / "parity_matrix.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    notes = "bytes that one of two ranks sends per optimizer step, ring algorithms, from the process group's own calls"
    _write_json(
        output / "bytes_on_wire.json",
        {**about, "what": notes, "engines": [wire_row(engine, wire, results) for engine in WIRE_ENGINES]},
    )
    worst = {key: max(row[key] for row in rows) for key in rows[0] if key.endswith("_deviation")}
    print(f"{len(rows)} cells; largest deviations: {worst}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
