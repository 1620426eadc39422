"""The tuner: measures each piece of the MLP with each candidate and the library, and writes the table.

    python -m scalevit.kernels.tuning --output FOLDER [--tokens 50432 ...] [--shape 768x3072 ...]

Nothing else ever measures: a training run reads tables and never tunes. Set SCALEVIT_TUNING=FOLDER to use
what was written, or commit the file beside the shipped tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from .. import pieces
from ..timing import copies_past_cache, time_calls
from . import SAVES, Plan, Table, Tile, device_name, read_table, table_path, token_bucket

SHAPES = ("768x3072", "768x1536", "384x1536", "1024x4096", "1280x5120")
TOKENS = (12608, 25216, 50432)

Call = Callable[[Tensor, Tile | None], object]


def _calls(save: str, d: int, h: int, m: int, device: torch.device, dtype: torch.dtype):
    """piece -> (kind of candidates, function of a tile). Random data: zeros run measurably faster."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    w1, b1, w2, b2 = normal(h, d) / d**0.5, normal(h), normal(d, h) / h**0.5, normal(d)
    keeps = {"none": "none", "fast": "slope", "lean": "pre"}[save]
    copies = copies_past_cache(m * (d + 2 * h) * dtype.itemsize, device)
    tokens = [normal(m, d) for _ in range(copies)]
    wide = [normal(m, h) for _ in range(copies)]
    out = torch.empty_like(w1)
    bias_out = torch.empty_like(b1)

    def each(function: Callable[[int, Tile | None], object]):
        return lambda tile: [lambda i=i: function(i, tile) for i in range(copies)]

    options = {"activation": "gelu", "save": keeps}
    calls = {
        "fc1": ("fc1", each(lambda i, t: pieces.hidden(tokens[i], w1, b1, **options, plan=Plan(fc1=t)))),
        "fc2": ("fc2", each(lambda i, t: pieces.linear(wide[i], w2, b2, tile=t))),
    }
    if save != "none":
        kind = "fc2_dgrad_lean" if save == "lean" else "fc2_dgrad"
        calls["fc2_dgrad"] = (
            kind,
            each(
                lambda i, t: pieces.hidden_grad(
                    tokens[i], w2, wide[i], **options, bias_out=bias_out, plan=Plan(fc2_dgrad=t)
                )
            ),
        )
        calls["fc1_dgrad"] = ("fc1_dgrad", each(lambda i, t: pieces.input_grad(wide[i], w1, tile=t)))
        calls["fc1_wgrad"] = (
            "wgrad",
            each(lambda i, t: pieces.weight_grad_into(out, wide[i], tokens[i], tile=t)),
        )
        calls["fc2_wgrad"] = (
            "wgrad",
            each(lambda i, t: pieces.weight_grad_into(out.view(d, h), tokens[i], wide[i], tile=t)),
        )
    return calls


def tune_shape(
    table: Table, save: str, m: int, d: int, h: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[Plan, dict[str, dict[str, float]]]:
    """The fastest choice for each piece, and the median microseconds of all of them."""
    plan, times = Plan(), {}
    for piece, (kind, make) in _calls(save, d, h, m, device, dtype).items():
        options: dict[str, Tile | None] = {"library": None}
        options |= {_label(tile): tile for tile in table.candidates[kind]}
        times[piece] = {name: time_calls(make(tile), device).p50 for name, tile in options.items()}
        best = min(times[piece], key=times[piece].__getitem__)
        plan = replace(plan, **{piece: options[best]})
    return plan, times


def _label(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}w{tile.warps}s{tile.stages}p{tile.parts}k{tile.splits}"


def write_table(path: Path, table: Table, entries: list[dict], measured: dict) -> None:
    """A table's file; `read_table` reads it back."""
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
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="batch x tokens to an image")
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="DxH")
    arguments = parser.parse_args(argv)
    shapes = [_shape(parser, text) for text in arguments.shape]
    if not torch.cuda.is_available():
        print("error: the tuner measures on a CUDA or ROCm device, and there is none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = device_name(device)
    # Defaults and candidates are the shipped table's; the entries go on from what the folder holds already.
    table = read_table(table_path(name, shipped=True))
    path = arguments.output / f"{name}.json"
    entries = list((read_table(path) if path.is_file() else table).entries)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    measured = {
        "device": torch.cuda.get_device_name(device), "sms": sms, "torch": torch.__version__,
        "triton": triton.__version__, "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m scalevit.kernels.tuning", *(sys.argv[1:] if argv is None else argv)]),
    }  # fmt: skip
    for d, h in shapes:
        for m in sorted(set(arguments.tokens)):
            for save in SAVES:
                plan, times = tune_shape(table, save, m, d, h, device)
                key = {"sms": sms, "tokens": token_bucket(m), "d": d, "h": h, "save": save}
                entries = [e for e in entries if any(e[k] != value for k, value in key.items())]
                entries.append({**key, "plan": plan, "microseconds": times})
                write_table(path, table, entries, measured)  # a run that is stopped leaves what it has
                print(f"{m} tokens {d}x{h} {save}: " + ", ".join(_summary(p, t) for p, t in times.items()))
    print(f"wrote {path}; SCALEVIT_TUNING={arguments.output} uses it")
    return 0


def _shape(parser: argparse.ArgumentParser, text: str) -> tuple[int, int]:
    d, _, h = text.partition("x")
    if not (d.isdigit() and h.isdigit()):
        parser.error(f"--shape takes DxH, as in 768x3072; got {text!r}")
    return int(d), int(h)


def _summary(piece: str, times: dict[str, float]) -> str:
    best = min(times, key=times.__getitem__)
    return f"{piece} {best} {times[best]:.0f} us (library {times['library']:.0f})"


if __name__ == "__main__":
    sys.exit(main())
