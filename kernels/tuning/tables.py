"""Tables that say for each device how the matrix products of the MLP run. Read once; nothing measures or writes here.

A table is a JSON file named after an architecture, `sm_90.json` for plain and `sm_90.gated.json` for gated MLPs, with

    "measured"    null until it has been measured (the plans are then tiles that compile well ahead of time), else the
                  device, versions and date;
    "default"     save mode -> plan, for any shape;
    "candidates"  what the tuner tries for each kind of product;
    "entries"     what `python -m scalevit.kernels.tuning` measured: {"sms", "tokens", "d", "h", "save", "plan"}.

A plan gives each product a tile of ours, or "library" for torch's matrix product (cuBLAS, hipBLASLt). Tables are
looked up in $SCALEVIT_TUNING (a folder, to which the tuner writes), then beside this file; a device without a table
uses `fallback.json` or `fallback.gated.json`. fp32 always uses the library, whose products follow torch's TF32 setting.

Must not know kernels or what is computed.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

TABLES = Path(__file__).parent
GATED = ".gated"  # ends the name of a table for gated MLPs
# In a gated MLP fc1 is the products of gate and value, and fc1_dgrad the sum of both of their products.
PRODUCTS = ("fc1", "fc2", "fc2_dgrad", "fc1_dgrad", "fc1_wgrad", "fc2_wgrad")
# Kinds of candidates: the products, with the backward of "lean" separate and both weight gradients together.
CANDIDATES = ("fc1", "fc2", "fc2_dgrad", "fc2_dgrad_lean", "fc1_dgrad", "wgrad")
# "none" is inference; "recompute" runs the kernels of "fast".
SAVES = ("none", "fast", "lean")
# Save mode -> what fc1 keeps for the backward: nothing, gelu' (a gated MLP: the factors of both gradients) or the
# pre-activation.
KEPT = {"none": "none", "fast": "slope", "lean": "pre"}


@dataclass(frozen=True)
class Tile:
    """One launch configuration of a matrix product.

    Attributes:
        block_m, block_n, block_k: the tile, in elements. fc1 of a gated MLP computes two of this size at once.
        warps, stages: Triton's num_warps and num_stages.
        parts: column parts of the epilogue (1, 2 or 4).
        group_m: row blocks that go through the columns together, for reuse of the L2 cache.
        descriptors: load and store through tensor descriptors (TMA on Hopper) where the alignment allows it.
        ctas_per_sm: persistent programs per SM; 0 launches one program per tile.
        splits: for weight gradients, parts of the token dimension.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    parts: int = 1
    group_m: int = 8
    descriptors: bool = True
    ctas_per_sm: int = 0
    splits: int = 1


@dataclass(frozen=True)
class KernelPlan:
    """A tile for each product, or None for the library's product (followed by a pointwise GELU where one belongs)."""

    fc1: Tile | None = None
    fc2: Tile | None = None
    fc2_dgrad: Tile | None = None
    fc1_dgrad: Tile | None = None
    fc1_wgrad: Tile | None = None
    fc2_wgrad: Tile | None = None

    @classmethod
    def parse(cls, plan: dict, where: str) -> KernelPlan:
        """A plan from a table. Raises ValueError that names `where` and the key that is not valid."""
        unknown = sorted(set(plan) - set(PRODUCTS))
        if unknown:
            raise ValueError(f"{where}: unknown product {unknown[0]!r}; expected one of {', '.join(PRODUCTS)}")
        return cls(**{product: _parse_tile(value, f"{where}.{product}") for product, value in plan.items()})

    def as_json(self) -> dict:
        return {p: "library" if getattr(self, p) is None else asdict(getattr(self, p)) for p in PRODUCTS}

    def tiles(self) -> dict[str, Tile]:
        """The products that run in Triton, with their tiles."""
        return {p: getattr(self, p) for p in PRODUCTS if getattr(self, p) is not None}


def _parse_tile(value: object, where: str) -> Tile | None:
    if value == "library":
        return None
    if not isinstance(value, dict):
        raise ValueError(f'{where}: must be "library" or a tile; got {value!r}')
    types = {f.name: bool if f.name == "descriptors" else int for f in fields(Tile)}
    for key, item in value.items():
        if key not in types:
            raise ValueError(f"{where}: unknown key {key!r}; expected one of {', '.join(types)}")
        if type(item) is not types[key]:
            raise ValueError(f"{where}.{key}: must be {types[key].__name__}; got {item!r}")
    missing = [k for k in ("block_m", "block_n", "block_k") if k not in value]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    return Tile(**value)


LIBRARY = KernelPlan()
# What runs where the operands do not have the alignment that a plan's tiles require: the tiles of fallback.json, which
# compile without spills on every target for any sizes, strides and addresses.
UNALIGNED = Tile(128, 64, 32, warps=8, stages=3, parts=4, descriptors=False)
UNALIGNED_WGRAD = Tile(64, 64, 32, warps=8, stages=3, descriptors=False)
# Architectures with the instructions and limits of another one, whose table they use.
ALIASES = {"sm_86": "sm_89", "sm_87": "sm_89", "sm_103": "sm_100"}
# Every product in Triton, on tiles small enough for the interpreter; persistent, in two parts, with splits.
_SMALL = Tile(32, 32, 32, parts=2, group_m=2, ctas_per_sm=2)
_SMALL_SPLIT = Tile(32, 32, 32, group_m=2, ctas_per_sm=2, splits=3)
INTERPRETER = KernelPlan(_SMALL, _SMALL, _SMALL, _SMALL, _SMALL_SPLIT, _SMALL_SPLIT)


@dataclass(frozen=True)
class Table:
    """One file of plans. measured: None, or the device, versions and date of the measurements."""

    name: str
    measured: dict | None
    default: dict[str, KernelPlan]
    candidates: dict[str, tuple[Tile, ...]]
    entries: tuple[dict, ...]

    @property
    def gated(self) -> bool:
        """Whether the table is for gated MLPs."""
        return self.name.endswith(GATED)

    def plan(self, sms: int, tokens: int, d: int, h: int, save: str) -> KernelPlan:
        """The measured plan for this shape, with tokens rounded up to a power of two, or the default."""
        for entry in self.entries:
            key = (entry["sms"], entry["tokens"], entry["d"], entry["h"], entry["save"])
            if key == (sms, token_bucket(tokens), d, h, save):
                return entry["plan"]
        return self.default[save]


def token_bucket(tokens: int) -> int:
    """The next power of two of a number of tokens: one measurement is used for all numbers in the bucket."""
    return 1 << max(tokens - 1, 0).bit_length()


def read_table(path: Path) -> Table:
    """A table from its file. Raises ValueError that names the file and the key that is not valid."""
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for key in ("measured", "default", "candidates", "entries"):
        if key not in raw:
            raise ValueError(f"{path}: {key} is missing")
    for save in SAVES:
        if save not in raw["default"]:
            raise ValueError(f"{path}: default.{save} is missing")
    default = {s: KernelPlan.parse(raw["default"][s], f"{path}: default.{s}") for s in SAVES}
    candidates = {}
    for kind in CANDIDATES:
        where = f"{path}: candidates.{kind}"
        tiles = [_parse_tile(t, where) for t in raw["candidates"].get(kind, [])]
        candidates[kind] = tuple(t for t in tiles if t is not None)
    entries = []
    for i, entry in enumerate(raw["entries"]):
        missing = [k for k in ("sms", "tokens", "d", "h", "save", "plan") if k not in entry]
        if missing:
            raise ValueError(f"{path}: entries[{i}].{missing[0]} is missing")
        entries.append({**entry, "plan": KernelPlan.parse(entry["plan"], f"{path}: entries[{i}].plan")})
    return Table(path.stem, raw["measured"], default, candidates, tuple(entries))


def device_name(device: torch.device) -> str:
    """The name of a device's table: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def table_path(name: str, *, gated: bool = False, shipped: bool = False) -> Path:
    """The table of an architecture: the user's (unless `shipped`), the shipped one, its alias's, or the fall-back."""
    users = None if shipped else os.environ.get("SCALEVIT_TUNING")
    folders = [Path(f) for f in (users,) if f] + [TABLES]
    names = [name, ALIASES.get(name, "fallback"), "fallback"]
    paths = [folder / f"{n}{GATED * gated}.json" for n in names for folder in folders]
    return next(path for path in paths if path.is_file())


@functools.cache
def _device_table(index: int, gated: bool) -> tuple[Table, int]:
    device = torch.device("cuda", index)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return read_table(table_path(device_name(device), gated=gated)), sms


def find_plan(x: torch.Tensor, width: int, save: str, *, gated: bool = False) -> KernelPlan:
    """The plan for tokens x: (M, D) and `width` hidden units. save as in `fused_mlp`, or "none"."""
    if x.device.type == "cpu":
        return INTERPRETER
    if x.dtype == torch.float32:
        return LIBRARY
    table, sms = _device_table(x.device.index, gated)
    return table.plan(sms, x.shape[0], x.shape[1], width, "fast" if save == "recompute" else save)
