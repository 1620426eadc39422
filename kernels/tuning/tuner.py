"""The tuner: measures each product of the MLP with each candidate and with the library, and writes the table.

    python -m scalevit.kernels.tuning --output FOLDER [--tokens 50432 ...] [--shape 768x3072 ...] [--gated]

Tuning is explicit: a training run reads tables and never measures. Set SCALEVIT_TUNING=FOLDER to use the table that was
written, or commit the file beside the shipped tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scalevit.kernels import products
from scalevit.kernels.gated_products import GatedFc1, Halves, halves_of
from scalevit.kernels.passes import FirstLayers
from scalevit.kernels.timing import cold_cache_copies, environment, time_calls
from scalevit.kernels.tuning.tables import (
    GATED,
    KEPT,
    SAVES,
    KernelPlan,
    Table,
    Tile,
    device_name,
    read_table,
    table_path,
    token_bucket,
)

SHAPES = ("768x3072", "768x1536", "384x1536", "1024x4096", "1280x5120")
GATED_SHAPES = ("384x1536", "768x3072", "1024x2816", "1536x4096")
TOKENS = (12608, 25216, 50432)

# One call for each copy of the inputs, with a tile or, for None, the library.
CallsWithTile = Callable[[Tile | None], list[Callable[[], object]]]


def _first_layers(gated: bool, w1: Tensor, b1: Tensor) -> FirstLayers:
    """What precedes fc2, with gradients to fill. Gate and value are packed, as in most of timm's models."""
    dw1, db1 = torch.empty_like(w1), torch.empty_like(b1)
    if not gated:
        return products.Fc1(w1, b1, "gelu", dw1, db1)
    packed = (Halves(*halves_of(t, 0, gate_last=False), t) for t in (w1, b1, dw1, db1))
    weights, biases, weight_grads, bias_grads = packed
    return GatedFc1(weights, biases, "silu", False, weight_grads, bias_grads)


def _calls(
    gated: bool, save: str, d: int, h: int, m: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[str, CallsWithTile]]:
    """product -> (kind of candidates, its calls). The data are random, because zeros run measurably faster."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    rows = 2 * h if gated else h
    first = _first_layers(gated, normal(rows, d) / d**0.5, normal(rows))
    w2, b2, dw2 = normal(d, h) / h**0.5, normal(d), normal(d, h)
    copies = cold_cache_copies(m * (d + 2 * rows) * dtype.itemsize, device)
    narrow = [normal(m, d) for _ in range(copies)]
    wide = [normal(m, rows) for _ in range(copies)]
    hidden = [normal(m, h) for _ in range(copies)] if gated else wide

    def each(others: list[Tensor], function: Callable[[Tensor, Tensor, Tile | None], object]) -> CallsWithTile:
        return lambda tile: [partial(function, n, o, tile) for n, o in zip(narrow, others, strict=True)]

    def fc1(n: Tensor, w: Tensor, tile: Tile | None) -> object:
        return first.hidden(n, save=KEPT[save], plan=KernelPlan(fc1=tile))

    def fc2_dgrad(n: Tensor, w: Tensor, tile: Tile | None) -> object:
        return first.hidden_grad(n, w2, w, save=KEPT[save], plan=KernelPlan(fc2_dgrad=tile))

    calls = {
        "fc1": ("fc1", each(wide, fc1)),
        "fc2": ("fc2", each(hidden, lambda n, w, t: products.linear(w, w2, b2, tile=t))),
    }
    if save != "none":
        calls |= {
            "fc2_dgrad": ("fc2_dgrad_lean" if save == "lean" else "fc2_dgrad", each(wide, fc2_dgrad)),
            "fc1_dgrad": ("fc1_dgrad", each(wide, lambda n, w, t: first.input_grad(w, tile=t))),
            "fc1_wgrad": ("wgrad", each(wide, lambda n, w, t: first.fill_weight_grad(w, n, tile=t))),
            "fc2_wgrad": ("wgrad", each(hidden, lambda n, w, t: products.weight_grad_into(dw2, n, w, tile=t))),
        }
    return calls


def tune_shape(
    table: Table, save: str, m: int, d: int, h: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[KernelPlan, dict[str, dict[str, float]]]:
    """The fastest choice for each product, and the median microseconds of all choices."""
    plan, times = KernelPlan(), {}
    for product, (kind, make) in _calls(table.gated, save, d, h, m, device, dtype).items():
        options: dict[str, Tile | None] = {"library": None}
        options |= {_label(tile): tile for tile in table.candidates[kind]}
        times[product] = {name: time_calls(make(tile), device).p50 for name, tile in options.items()}
        best = min(times[product], key=times[product].__getitem__)
        plan = replace(plan, **{product: options[best]})
    return plan, times


def _label(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}w{tile.warps}s{tile.stages}p{tile.parts}k{tile.splits}"


def write_table(path: Path, table: Table, entries: list[dict], measured: dict) -> None:
    """Writes a table's file, which `read_table` reads."""
    content = {
        "about": "Measured by python -m scalevit.kernels.tuning.",
        "measured": measured,
        "default": {save: plan.as_json() for save, plan in table.default.items()},
        "candidates": {kind: [asdict(t) for t in tiles] for kind, tiles in table.candidates.items()},
        "entries": [{**entry, "plan": entry["plan"].as_json()} for entry in entries],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scalevit.kernels.tuning", description="Measure and write a table.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the table")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="images times tokens per image")
    parser.add_argument(
        "--shape", nargs="+", metavar="DxH", help="of a gated MLP, H is half of the rows of its packed fc1"
    )
    parser.add_argument("--gated", action="store_true", help="measure gated MLPs; their table ends in .gated.json")
    arguments = parser.parse_args(argv)
    shapes = [_shape(parser, text) for text in arguments.shape or (GATED_SHAPES if arguments.gated else SHAPES)]
    if not torch.cuda.is_available():
        print("error: the tuner measures on a CUDA or ROCm device, and there is none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = device_name(device)
    # Defaults and candidates are the shipped table's; entries that the folder's table already has are kept.
    table = read_table(table_path(name, gated=arguments.gated, shipped=True))
    path = arguments.output / f"{name}{GATED * arguments.gated}.json"
    entries = list((read_table(path) if path.is_file() else table).entries)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    command = " ".join(["python -m scalevit.kernels.tuning", *(sys.argv[1:] if argv is None else argv)])
    measured = environment(device, command) | {"sms": sms}
    for d, h in shapes:
        for m in sorted(set(arguments.tokens)):
            for save in SAVES:
                plan, times = tune_shape(table, save, m, d, h, device)
                key = {"sms": sms, "tokens": token_bucket(m), "d": d, "h": h, "save": save}
                entries = [e for e in entries if any(e[k] != value for k, value in key.items())]
                entries.append({**key, "plan": plan, "microseconds": times})
                write_table(path, table, entries, measured)  # after each, so that a stopped run loses little
                print(f"{m} tokens {d}x{h} {save}: " + ", ".join(_summary(p, t) for p, t in times.items()))
    print(f"wrote {path}; SCALEVIT_TUNING={arguments.output} uses it")
    return 0


def _shape(parser: argparse.ArgumentParser, text: str) -> tuple[int, int]:
    d, _, h = text.partition("x")
    if not (d.isdigit() and h.isdigit()):
        parser.error(f"--shape takes DxH, as in 768x3072; got {text!r}")
    return int(d), int(h)


def _summary(product: str, times: dict[str, float]) -> str:
    best = min(times, key=times.__getitem__)
    return f"{product} {best} {times[best]:.0f} us (library {times['library']:.0f})"
