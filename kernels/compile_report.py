"""Ahead-of-time compile report: what each shipped tile needs on each architecture, without a GPU.

    python -m scalevit.kernels.compile_report [--arch sm_90 ...] [--mlp gated] [--tables FOLDER] [--json FILE]

Compiles every kernel of every table under `tuning/` (or FOLDER, to which the tuner writes) for the table's own
architecture, and those of the fall-back table for all architectures. It reads registers, stack, shared memory and
instructions from the machine code and prints them as a table. The exit status is 1 if a kernel fails one of the checks:
no bytes of stack and no local loads or stores (register spills), matrix instructions of the architecture present,
shared memory within the device's limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from scalevit.kernels.compile_jobs import ARCHITECTURES, MLPS, CompileJob, jobs_for, kernel_source
from scalevit.kernels.gemm import INTERPRETED
from scalevit.kernels.tuning.tables import TABLES, Tile


@dataclass(frozen=True)
class CompileReport:
    """What one compiled kernel needs.

    Attributes:
        registers: per thread.
        stack: bytes of spilled registers per thread.
        spills: instructions that load or store spilled registers.
        shared: bytes of shared memory.
        matrix, async_loads, instructions: numbers of matrix instructions, TMA or cp.async loads, and all instructions.
    """

    job: CompileJob
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    async_loads: int
    instructions: int

    def faults(self) -> list[str]:
        """The checks that the kernel fails; empty if it passes."""
        arch = ARCHITECTURES[self.job.arch]
        faults = []
        if self.stack or self.spills:
            faults.append(f"spills: {self.stack} bytes of stack, {self.spills} loads and stores")
        if self.job.tile and not self.matrix:
            faults.append(f"no {' or '.join(arch.matrix)}")
        if self.shared > arch.shared:
            faults.append(f"{self.shared} bytes of shared memory, the device has {arch.shared}")
        return faults


def compile_job(job: CompileJob) -> CompileReport:
    """Compiles one kernel and reads what it needs. Raises what the compiler raises."""
    arch = ARCHITECTURES[job.arch]
    tile = job.tile
    options = {"num_warps": tile.warps if tile else 4, "num_stages": tile.stages if tile else 3}
    options["enable_fp_fusion"] = True
    compiled = triton.compile(kernel_source(job), target=arch.target, options=options)
    reader = _read_amd if arch.target.backend == "hip" else _read_nvidia
    registers, stack, opcodes = reader(compiled)
    return CompileReport(
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
    """(registers, stack, instructions by opcode) of a cubin."""
    from triton.backends import nvidia  # absent from Triton builds for ROCm

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
    """The same of AMD's assembly text."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))
    # Scalar registers spill to lanes of vector registers, without memory traffic; vector registers spill to scratch.
    return field("vgpr_count"), field("private_segment_fixed_size"), opcodes


def _run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _attempt(job: CompileJob) -> CompileReport | str:
    try:
        return compile_job(job)
    except Exception as error:  # reported in the table, where a kernel that does not compile must not hide the others
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {str(cause).splitlines()[-1] if str(cause) else ''}"


def compile_all(jobs: list[CompileJob], processes: int) -> list[tuple[CompileJob, CompileReport | str]]:
    """Each job with its report, or with its error, in order."""
    if processes <= 1:
        return [(job, _attempt(job)) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(zip(jobs, pool.map(_attempt, jobs), strict=True))


# fmt: off
COLUMNS = (
    "arch", "table", "product", "save", "call", "tile", "regs", "stack", "spills", "shared", "matrix", "async", "instr",
)
# fmt: on


def _describe(tile: Tile | None) -> str:
    if tile is None:
        return "-"
    text = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages} p{tile.parts}"
    return text + (" desc" if tile.descriptors else " ptr") + (f" split{tile.splits}" if tile.splits > 1 else "")


def format_table(results: list[tuple[CompileJob, CompileReport | str]]) -> str:
    """The results as aligned columns, with faults at the end of their line."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    notes = [""]
    for job, report in results:
        call = f"{job.dtype} {job.activation} {'bias' if job.bias else 'plain'} {job.layout}"
        row = (job.arch, job.table or "-", job.product, job.save, call, _describe(job.tile))
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


def as_records(results: list[tuple[CompileJob, CompileReport | str]]) -> list[dict]:
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


def main(argv: Sequence[str] | None = None) -> int:
    summary = "Ahead-of-time compile report of every shipped tile; exit status 1 if a kernel fails a check."
    parser = argparse.ArgumentParser(prog="python -m scalevit.kernels.compile_report", description=summary)
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--mlp", nargs="+", choices=list(MLPS), default=list(MLPS), help="kinds of MLPs (default: all)")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of tables (default: the shipped ones)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile processes")
    every = "compile each tile for all dtypes, activations, biases and layouts, instead of the least and the most work"
    parser.add_argument("--every", action="store_true", help=every)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted and cannot be compiled")
    names = [f"{name}{MLPS[mlp][0]}.json" for name in (*arguments.arch, "fallback") for mlp in arguments.mlp]
    if not any((arguments.tables / name).is_file() for name in names):
        parser.error(f"--tables: {arguments.tables} has no table for {', '.join(arguments.arch)}")
    try:
        jobs = jobs_for(arguments.arch, mlps=arguments.mlp, every=arguments.every, tables=arguments.tables)
    except ValueError as error:  # a malformed table; the message names the file and the key
        parser.error(str(error))
    about = f"triton {triton.__version__}, {len(jobs)} kernels"
    print(f"{about}: compiling with {arguments.jobs} processes, which takes minutes", flush=True)
    results = compile_all(jobs, arguments.jobs)
    print(format_table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_records(results), indent=1) + "\n")
    failed = sum(isinstance(r, str) or bool(r.faults()) for _, r in results)
    passed = "all pass: no spills, matrix instructions present, shared memory within the limit"
    print(f"{failed} of {len(results)} fail" if failed else passed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
