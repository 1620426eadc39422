"""The kernels that the tuning tables can launch, as sources for Triton's ahead-of-time compiler.

Must not know how they are compiled or judged (`compile_report`), and needs no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from scalevit.kernels.gelu import POINTWISE_BLOCK, gelu_backward_kernel, gelu_forward_kernel
from scalevit.kernels.gelu_linear import linear_dgelu_kernel, linear_gelu_kernel
from scalevit.kernels.gemm import REDUCE_MANY, reduce_rows_kernel
from scalevit.kernels.tuning.tables import KEPT, TABLES, Table, Tile, read_table
from scalevit.kernels.weight_grad import weight_grad_kernel


@dataclass(frozen=True)
class Architecture:
    """A target. shared: bytes of shared memory that a program may use; matrix: its matrix instructions."""

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
class CompileJob:
    """One kernel to compile, as one kind of call of `fused_mlp` launches it.

    Attributes:
        arch, table: the architecture, and the table that names the tile ("" without a tile).
        product: one of `tables.PRODUCTS`, or a kernel without a tile: "gelu", "dgelu", "reduce".
        save: what the product writes or reads for the backward ("slope", "pre", "none").
        tile: the product's tile, or None.
        dtype: "bf16", "fp16" or "fp32".
        activation: "gelu" or "gelu_tanh".
        bias: whether the product adds fc1's or fc2's bias, or sums its gradient.
        layout: what the launcher knows about the tensors: "aligned", unit inner strides and every size and stride but
            the number of tokens divisible by 16; "even", the number of tokens too; "any", nothing.
    """

    arch: str
    table: str
    product: str
    save: str
    tile: Tile | None
    dtype: str = "bf16"
    activation: str = "gelu"
    bias: bool = False
    layout: str = "aligned"

    def called(self, dtype: str, activation: str, bias: bool, layout: str) -> CompileJob:
        """The job for a kind of call. Calls that run the same code give equal jobs."""
        activates = self.product in ("fc1", "gelu") or (self.product in ("fc2_dgrad", "dgelu") and self.save == "pre")
        # fp32 products run in the library; of our kernels only the pointwise ones see fp32.
        if dtype == "fp32" and self.product not in ("gelu", "dgelu"):
            dtype = "fp16"
        # Tensors that are not aligned run on the fall-back's pointer tiles.
        if layout == "any" and self.table != "fallback":
            layout = "even"
        return replace(
            self,
            dtype=dtype,
            activation=activation if activates else "gelu",
            bias=bias and self.product in ("fc1", "fc2", "fc2_dgrad"),
            layout=layout if self.tile else "aligned",
        )


# Kinds of calls: (dtype, activation, bias, layout).
EVERY_CALL = tuple(
    itertools.product(("bf16", "fp16", "fp32"), ("gelu", "gelu_tanh"), (False, True), ("aligned", "even", "any"))
)
# Those with the least and the most work in a kernel.
LEAST_AND_MOST = (("bf16", "gelu", False, "aligned"), ("fp32", "gelu_tanh", True, "any"))
WITHOUT_TILE = (("gelu", "none"), ("gelu", "slope"), ("dgelu", "slope"), ("dgelu", "pre"), ("reduce", "none"))


def jobs_for(archs: list[str], *, every: bool = False, tables: Path = TABLES) -> list[CompileJob]:
    """The kernels that the tables in a folder can launch on these architectures, each once.

    every: in all kinds of calls. Otherwise in two: the one with the least and the one with the most work.

    Raises:
        ValueError: a table is malformed.
    """
    launched = []
    for arch in archs:
        for name in (arch, "fallback"):
            path = tables / f"{name}.json"
            if path.is_file():
                launched += [CompileJob(arch, name, *launch) for launch in _launches(read_table(path))]
        launched += [CompileJob(arch, "", product, save, None) for product, save in WITHOUT_TILE]
    calls = EVERY_CALL if every else LEAST_AND_MOST
    return list(dict.fromkeys(job.called(*call) for job in launched for call in calls))


def _launches(table: Table) -> Iterator[tuple[str, str, Tile]]:
    """(product, what it writes or reads for the backward, tile) for all plans and candidates of a table."""
    plans = [*table.default.items(), *((entry["save"], entry["plan"]) for entry in table.entries)]
    found = [(product, KEPT[save], tile) for save, plan in plans for product, tile in plan.tiles().items()]
    for kind, tiles in table.candidates.items():
        product = {"fc2_dgrad_lean": "fc2_dgrad", "wgrad": "fc1_wgrad"}.get(kind, kind)
        saves = {"fc1": tuple(KEPT.values()), "fc2_dgrad_lean": ("pre",), "fc2_dgrad": ("slope",)}.get(kind, ("none",))
        found += [(product, save, tile) for save in saves for tile in tiles]
    for product, save, tile in found:
        if product == "fc2_dgrad" and save == "none":  # inference has no backward
            continue
        # The number of programs does not change the code.
        yield product, save if product in ("fc1", "fc2_dgrad") else "none", replace(tile, ctas_per_sm=0)


def kernel_source(job: CompileJob) -> ASTSource:
    """The kernel with the signature, constants and divisibility with which its launcher calls it."""
    kernel, types, constants = _pointwise(job) if job.tile is None else _product(job, job.tile)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = []
    if job.layout != "any":
        unaligned = ("M", "SIZE", "P") if job.layout == "aligned" else ()
        aligned = [n for n, t in signature.items() if t.startswith("*") or (t == "i32" and n not in unaligned)]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )


def _product(job: CompileJob, tile: Tile) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
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
    if job.product in ("fc1", "fc2"):
        kernel = linear_gelu_kernel
        types = {
            "x": block(tile.block_m, tile.block_k), "w": block(tile.block_n, tile.block_k),
            "bias": pointer, "post": output, "saved": output,
        }  # fmt: skip
        constants |= {"SAVE": job.save, "HAS_BIAS": job.bias, "EXACT": False}
        constants["ACTIVATION"] = job.activation if job.product == "fc1" else "none"
        unused = [*(["saved"] if job.save == "none" else []), *([] if job.bias else ["bias"])]
    elif job.product in ("fc2_dgrad", "fc1_dgrad"):
        kernel = linear_dgelu_kernel
        types = {
            "dy": block(tile.block_m, tile.block_k), "w": block(tile.block_k, tile.block_n),
            "saved": output, "post": output, "dpre": output, "partials": "*fp32",
        }  # fmt: skip
        unit_strides = ("stride_dyk", "stride_wn")
        constants |= {"SAVED": job.save, "EXACT": False, "PARTIALS": job.bias}
        constants["ACTIVATION"] = job.activation if job.product == "fc2_dgrad" else "none"
        unused = {"pre": [], "slope": ["post"], "none": ["post", "saved"]}[job.save]
        unused = unused if job.bias else [*unused, "partials"]
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


def _pointwise(job: CompileJob) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
    """The same for a kernel without a tile."""
    pointer = f"*{job.dtype}"
    if job.product == "reduce":
        block_p, block_n = REDUCE_MANY
        return reduce_rows_kernel, {"source": "*fp32", "target": pointer}, {"BP": block_p, "BN": block_n}
    constants: dict[str, object] = {
        "ACTIVATION": job.activation, "EXACT": job.dtype == "fp32", "ACC": tl.float32, "BLOCK": POINTWISE_BLOCK,
    }  # fmt: skip
    if job.product == "gelu":
        types = dict.fromkeys(("pre", "post", "slope"), pointer)
        return gelu_forward_kernel, types, constants | {"SAVE_SLOPE": job.save == "slope"}
    types = dict.fromkeys(("dpost", "saved", "dpre", "post"), pointer)
    unused = {} if job.save == "pre" else {"post": None}
    return gelu_backward_kernel, types, constants | {"SAVED": job.save} | unused
