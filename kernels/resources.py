"""Ahead-of-time compile report: what each shipped tile costs on each architecture, without a GPU.

    python -m scalevit.kernels.resources [--arch sm_90 ...] [--tables FOLDER] [--jobs 2] [--json FILE]

Compiles every kernel of every table under `tuning/` (or FOLDER, where the tuner writes), for the table's own
architecture (the fall-back table for all of them), reads registers, stack, shared memory and instructions from
the machine code, prints them as a table, and exits with status 1 if one fails the gate: no bytes of stack and no
local loads or stores (register spills), matrix instructions present (of the kind the architecture is for),
shared memory within the chip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .gelu import POINTWISE_BLOCK, gelu_backward_kernel, gelu_forward_kernel
from .gelu_linear import INTERPRETED, REDUCE_MANY, linear_dgelu_kernel, linear_gelu_kernel, reduce_rows_kernel
from .tuning import SAVES, TABLES, Table, Tile, read_table
from .weight_grad import weight_grad_kernel


@dataclass(frozen=True)
class Architecture:
    """A target. shared: bytes a program may use; matrix: the instructions that multiply matrices there."""

    name: str
    target: GPUTarget
    shared: int
    matrix: tuple[str, ...]


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, ("HMMA",)),
        Architecture("sm_89", GPUTarget("cuda", 89, 32), 99 * 1024, ("HMMA",)),
        Architecture("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, ("HGMMA",)),
        Architecture("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, ("UTCHMMA", "UTCQMMA", "UTCMMA")),
        Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, ("v_mfma",)),
        Architecture("gfx90a", GPUTarget("hip", "gfx90a", 64), 64 * 1024, ("v_mfma",)),
    )
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile, as one way of calling `fused_mlp` launches it.

    piece: one of `tuning.PIECES`, or a kernel without a tile: "gelu", "dgelu", "reduce". save: what a piece
    writes or reads for the backward ("slope", "pre", "none"). bias: the piece adds fc1's or fc2's bias, or
    sums its gradient. layout: what the launcher sees of the tensors: "aligned" has unit inner strides and
    everything but the number of tokens a multiple of 16, "even" the tokens too, "any" nothing of it.
    """

    arch: str
    table: str
    piece: str
    save: str
    tile: Tile | None
    dtype: str = "bf16"
    activation: str = "gelu"
    bias: bool = False
    layout: str = "aligned"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs. stack: bytes of spilled registers for each thread; spills: the
    instructions that move them; matrix: matrix instructions; async_loads: TMA or cp.async ones."""

    job: Job
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    async_loads: int
    instructions: int

    def faults(self) -> list[str]:
        """What the gate holds against it; empty if it passes."""
        arch = ARCHITECTURES[self.job.arch]
        faults = []
        if self.stack or self.spills:
            faults.append(f"spills: {self.stack} bytes of stack, {self.spills} loads and stores")
        if self.job.tile and not self.matrix:
            faults.append(f"no {' or '.join(arch.matrix)}")
        if self.shared > arch.shared:
            faults.append(f"{self.shared} bytes of shared memory, the chip has {arch.shared}")
        return faults


def jobs_for(archs: list[str], *, every: bool = False, tables: Path = TABLES) -> list[Job]:
    """The kernels that the tables in a folder can launch on these architectures, each once.

    `every` gives all ways of calling them: the product of dtypes, activations, biases and layouts. Without it
    two corners of that product stand for each launch: the one of the least work and the one of the most.
    """
    found: dict[Job, None] = {}
    for arch in archs:
        for name in (arch, "fallback"):
            path = tables / f"{name}.json"
            if not path.is_file():
                continue
            for piece, save, tile in _launches(read_table(path)):
                # A kernel is the same for every number of programs.
                job = Job(arch, name, piece, save, replace(tile, ctas_per_sm=0))
                found |= dict.fromkeys(_variants(job, every))
        for piece, save in (("gelu", "none"), ("gelu", "slope"), ("dgelu", "slope"), ("dgelu", "pre")):
            found |= dict.fromkeys(_variants(Job(arch, "", piece, save, None), every))
        found |= dict.fromkeys(replace(Job(arch, "", "reduce", "none", None), dtype=d) for d in ("bf16", "fp16"))
    return list(found)


def _variants(job: Job, every: bool) -> Iterator[Job]:
    """The ways of calling that change a launch's machine code: all of them, or the least and the most work."""
    tile = job.tile
    activates = job.piece in ("fc1", "gelu") or (job.piece in ("fc2_dgrad", "dgelu") and job.save == "pre")
    # fp32 multiplies by the library, and has pointwise kernels of ours alone.
    axes = {
        "activation": ("gelu", "gelu_tanh") if activates else ("gelu",),
        "dtype": ("bf16", "fp16") if tile else ("bf16", "fp16", "fp32"),
        "bias": (False, True) if job.piece in ("fc1", "fc2", "fc2_dgrad") else (False,),
        # What descriptors cannot read runs on the fall-back's pointer tiles.
        "layout": ("aligned", "even", *(("any",) if job.table == "fallback" else ())) if tile else ("aligned",),
    }
    corners = itertools.product(*axes.values()) if every else zip(*((v[0], v[-1]) for v in axes.values()), strict=True)
    for corner in corners:
        yield replace(job, **dict(zip(axes, corner, strict=True)))


def _launches(table: Table) -> Iterator[tuple[str, str, Tile]]:
    """(piece, what it saves or reads, tile) for all that a table's plans and candidates can launch."""
    keeps = {"none": "none", "fast": "slope", "lean": "pre"}
    plans = [(save, table.default[save]) for save in SAVES]
    plans += [(entry["save"], entry["plan"]) for entry in table.entries]
    for save, plan in plans:
        for piece, tile in plan.tiles().items():
            if piece not in ("fc1", "fc2_dgrad"):
                yield piece, "none", tile
            elif piece == "fc1" or save != "none":  # inference has no backward
                yield piece, keeps[save], tile
    for kind, tiles in table.candidates.items():
        for tile in tiles:
            if kind == "fc1":
                yield from (("fc1", save, tile) for save in keeps.values())
            elif kind.startswith("fc2_dgrad"):
                yield "fc2_dgrad", "pre" if kind == "fc2_dgrad_lean" else "slope", tile
            else:
                yield "fc1_wgrad" if kind == "wgrad" else kind, "none", tile


def _source(job: Job) -> ASTSource:
    """The kernel as its launcher calls it."""
    kernel, types, constants = _pointwise(job) if job.tile is None else _product(job, job.tile)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    scalars = {"aligned": {"M", "SIZE", "P"}, "even": set()}.get(job.layout)
    aligned = [n for n, t in signature.items() if t.startswith("*") or (t == "i32" and n not in (scalars or ()))]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned if scalars is not None},
    )


def _product(job: Job, tile: Tile) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
    """The kernel of a matrix product, the types of its pointers and descriptors, its constants."""
    pointer = f"*{job.dtype}"

    def block(rows: int, cols: int) -> str:
        return f"tensordesc<{job.dtype}[{rows}, {cols}]>" if tile.descriptors else pointer

    output = block(tile.block_m, tile.block_n // tile.parts)
    constants: dict[str, object] = {
        "BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k, "GROUP_M": tile.group_m,
        "PARTS": tile.parts, "DESCRIPTORS": tile.descriptors, "ACC": tl.float32, "PRECISION": "ieee",
    }  # fmt: skip
    unit_strides = ("stride_xk", "stride_wk")
    unused: list[str] = []
    if job.piece in ("fc1", "fc2"):
        kernel = linear_gelu_kernel
        types = {
            "x": block(tile.block_m, tile.block_k), "w": block(tile.block_n, tile.block_k),
            "bias": pointer, "post": output, "saved": output,
        }  # fmt: skip
        constants |= {"SAVE": job.save, "HAS_BIAS": job.bias, "EXACT": False}
        constants["ACTIVATION"] = job.activation if job.piece == "fc1" else "none"
        unused = [*(["saved"] if job.save == "none" else []), *([] if job.bias else ["bias"])]
    elif job.piece in ("fc2_dgrad", "fc1_dgrad"):
        kernel = linear_dgelu_kernel
        types = {
            "dy": block(tile.block_m, tile.block_k), "w": block(tile.block_k, tile.block_n),
            "saved": output, "post": output, "dpre": output, "partials": "*fp32",
        }  # fmt: skip
        unit_strides = ("stride_dyk", "stride_wn")
        sums = job.bias and job.piece == "fc2_dgrad"
        constants |= {"SAVED": job.save, "EXACT": False, "PARTIALS": sums}
        constants["ACTIVATION"] = job.activation if job.piece == "fc2_dgrad" else "none"
        unused = {"pre": [], "slope": ["post"], "none": ["post", "saved"]}[job.save]
        unused = unused if sums else [*unused, "partials"]
    else:
        kernel = weight_grad_kernel
        types = {
            "dy": block(tile.block_k, tile.block_m), "x": block(tile.block_k, tile.block_n),
            "out": "*fp32" if tile.splits > 1 else pointer,
        }  # fmt: skip
        unit_strides = ("stride_dyn", "stride_xk")
        constants |= {"SPLITS": tile.splits}
    constants |= dict.fromkeys(unused) | dict.fromkeys(unit_strides if job.layout != "any" else (), 1)
    return kernel, types, constants


def _pointwise(job: Job) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
    """The same for a kernel without a tile."""
    pointer = f"*{job.dtype}"
    if job.piece == "reduce":
        block_p, block_n = REDUCE_MANY
        return reduce_rows_kernel, {"source": "*fp32", "target": pointer}, {"BP": block_p, "BN": block_n}
    constants: dict[str, object] = {
        "ACTIVATION": job.activation, "EXACT": job.dtype == "fp32", "ACC": tl.float32, "BLOCK": POINTWISE_BLOCK,
    }  # fmt: skip
    if job.piece == "gelu":
        types = dict.fromkeys(("pre", "post", "slope"), pointer)
        return gelu_forward_kernel, types, constants | {"SAVE_SLOPE": job.save == "slope"}
    types = dict.fromkeys(("dpost", "saved", "dpre", "post"), pointer)
    unused = {} if job.save == "pre" else {"post": None}
    return gelu_backward_kernel, types, constants | {"SAVED": job.save} | unused


def compile_job(job: Job) -> Report:
    """Compiles one kernel and reads what it needs. Raises whatever the compiler raises."""
    arch = ARCHITECTURES[job.arch]
    tile = job.tile
    options = {"num_warps": tile.warps if tile else 4, "num_stages": tile.stages if tile else 3}
    options["enable_fp_fusion"] = True
    compiled = triton.compile(_source(job), target=arch.target, options=options)
    reader = _read_amd if arch.target.backend == "hip" else _read_nvidia
    registers, stack, opcodes = reader(compiled)
    return Report(
        job, registers, stack,
        spills=_count(opcodes, "LDL", "STL", "scratch_load", "scratch_store"),
        shared=compiled.metadata.shared,
        matrix=_count(opcodes, *arch.matrix),
        async_loads=_count(opcodes, "UTMALDG", "LDGSTS"),
        instructions=sum(opcodes.values()),
    )  # fmt: skip


def _count(opcodes: Counter[str], *prefixes: str) -> int:
    return sum(n for opcode, n in opcodes.items() if opcode.startswith(prefixes))


def _read_nvidia(compiled) -> tuple[int, int, Counter[str]]:
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return int(found[1]), int(found[2]), Counter(lines)


def _read_amd(compiled) -> tuple[int, int, Counter[str]]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))
    # Spills of scalar registers go to lanes of vector ones and cost no memory; vector spills are scratch.
    return field("vgpr_count"), field("private_segment_fixed_size"), opcodes


def _run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _attempt(job: Job) -> Report | str:
    try:
        return compile_job(job)
    except Exception as error:  # one kernel that does not compile must not hide the others
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {str(cause).splitlines()[-1] if str(cause) else ''}"


def compile_all(jobs: list[Job], processes: int) -> list[tuple[Job, Report | str]]:
    """Every job with its report, or with the error that stopped it, in order."""
    if processes <= 1:
        return [(job, _attempt(job)) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(zip(jobs, pool.map(_attempt, jobs), strict=True))


COLUMNS = (
    "arch",
    "table",
    "piece",
    "save",
    "call",
    "tile",
    "regs",
    "stack",
    "spills",
    "shared",
    "matrix",
    "async",
    "instr",
)


def _describe(tile: Tile | None) -> str:
    if tile is None:
        return "-"
    text = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages} p{tile.parts}"
    return text + (" desc" if tile.descriptors else " ptr") + (f" split{tile.splits}" if tile.splits > 1 else "")


def format_table(results: list[tuple[Job, Report | str]]) -> str:
    """The results as aligned columns, faults at the end of their line."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    notes = [""]
    for job, report in results:
        how = f"{job.dtype} {job.activation} {'bias' if job.bias else 'plain'} {job.layout}"
        row = (job.arch, job.table or "-", job.piece, job.save, how, _describe(job.tile))
        if isinstance(report, str):
            rows.append((*row, *("-" * 7)))
            notes.append(f"  FAILED: {report}")
            continue
        numbers = (
            report.registers, report.stack, report.spills, report.shared, report.matrix,
            report.async_loads, report.instructions,
        )  # fmt: skip
        rows.append((*row, *map(str, numbers)))
        notes.append("".join(f"  FAILED: {fault}" for fault in report.faults()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() + note for line, note in zip(lines, notes, strict=True))


def as_records(results: list[tuple[Job, Report | str]]) -> list[dict]:
    """The results for a JSON file."""
    records = []
    for job, report in results:
        record = asdict(job)
        if isinstance(report, str):
            record["error"] = report
        else:
            record |= {k: v for k, v in asdict(report).items() if k != "job"} | {"faults": report.faults()}
        records.append(record)
    return records


def main(argv: list[str] | None = None) -> int:
    summary = "Ahead-of-time compile report of every shipped tile; exit status 1 if one fails the gate."
    parser = argparse.ArgumentParser(prog="python -m scalevit.kernels.resources", description=summary)
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of tables (default: the shipped ones)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile processes")
    every = "all dtypes, activations, biases and layouts of each tile, instead of the least and the most work"
    parser.add_argument("--every", action="store_true", help=every)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted and cannot be compiled")
    if not any((arguments.tables / f"{name}.json").is_file() for name in (*arguments.arch, "fallback")):
        parser.error(f"--tables: {arguments.tables} has no table for {', '.join(arguments.arch)}")
    try:
        jobs = jobs_for(arguments.arch, every=arguments.every, tables=arguments.tables)
    except ValueError as error:  # a malformed table; the message names file and key
        parser.error(str(error))
    about = f"triton {triton.__version__}, {len(jobs)} kernels"
    print(f"{about}: compiling with {arguments.jobs} processes, which takes minutes", flush=True)
    results = compile_all(jobs, arguments.jobs)
    print(format_table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_records(results), indent=1) + "\n")
    failed = sum(isinstance(r, str) or bool(r.faults()) for _, r in results)
    passed = "all pass: no spills, matrix instructions present, shared memory within the chip"
    print(f"{failed} of {len(results)} fail" if failed else passed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
