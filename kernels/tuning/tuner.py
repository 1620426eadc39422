"""The tuner: measures each product of the MLP with each candidate and with the library, and writes the table.

    python -m scalevit.kernels.tuning --output FOLDER [--tokens 50432 ...] [--shape 768x3072 ...]

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
from scalevit.kernels.timing import cold_cache_copies, environment, time_calls
from scalevit.kernels.tuning.tables import (
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
TOKENS = (12608, 25216, 50432)

# One call for each copy of the inputs, with a tile or, for None, the library.
CallsWithTile = Callable[[Tile | None], list[Callable[[], object]]]


def _calls(
    save: str, d: int, h: int, m: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[str, CallsWithTile]]:
    """product -> (kind of candidates, its calls). The data are random, because zeros run measurably faster."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    w1, b1, w2, b2 = normal(h, d) / d**0.5, normal(h), normal(d, h) / h**0.5, normal(d)
    copies = cold_cache_copies(m * (d + 2 * h) * dtype.itemsize, device)
    narrow = [normal(m, d) for _ in range(copies)]
    wide = [normal(m, h) for _ in range(copies)]
    out, bias_out = torch.empty_like(w1), torch.empty_like(b1)

    def each(function: Callable[[Tensor, Tensor, Tile | None], object]) -> CallsWithTile:
        return lambda tile: [partial(function, n, w, tile) for n, w in zip(narrow, wide, strict=True)]

    def fc1(n: Tensor, w: Tensor, tile: Tile | None) -> object:
        return products.hidden(n, w1, b1, activation="gelu", save=KEPT[save], plan=KernelPlan(fc1=tile))

    def fc2_dgrad(n: Tensor, w: Tensor, tile: Tile | None) -> object:
        plan = KernelPlan(fc2_dgrad=tile)
        return products.hidden_grad(n, w2, w, activation="gelu", save=KEPT[save], bias_out=bias_out, plan=plan)

    calls = {"fc1": ("fc1", each(fc1)), "fc2": ("fc2", each(lambda n, w, t: products.linear(w, w2, b2, tile=t)))}
    if save != "none":
        calls |= {
            "fc2_dgrad": ("fc2_dgrad_lean" if save == "lean" else "fc2_dgrad", each(fc2_dgrad)),
            "fc1_dgrad": ("fc1_dgrad", each(lambda n, w, t: products.input_grad(w, w1, tile=t))),
            "fc1_wgrad": ("wgrad", each(lambda n, w, t: products.weight_grad_into(out, w, n, tile=t))),
            "fc2_wgrad": ("wgrad", each(lambda n, w, t: products.weight_grad_into(out.view(d, h), n, w, tile=t))),
        }
    return calls


def tune_shape(
    table: Table, save: str, m: int, d: int, h: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[KernelPlan, dict[str, dict[str, float]]]:
    """The fastest choice for each product, and the median microseconds of all choices."""
    plan, times = KernelPlan(), {}
    for product, (kind, make) in _calls(save, d, h, m, device, dtype).items():
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
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="DxH")
    arguments = parser.parse_args(argv)
    shapes = [_shape(parser, text) for text in arguments.shape]
    if not torch.cuda.is_available():
        print("error: the tuner measures on a CUDA or ROCm device, and there is none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = device_name(device)
    # Defaults and candidates are the shipped table's; entries that the folder's table already has are kept.
    table = read_table(table_path(name, shipped=True))
    path = arguments.output / f"{name}.json"
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
