"""The kernels that the tuning tables can launch, as sources for Triton's ahead-of-time compiler.

Must not know how they are compiled or judged (`compile_report`), and needs no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from scalevit.kernels.gated_linear import linear_dgate_kernel, linear_gate_kernel, sum_of_products_kernel
from scalevit.kernels.gating import GATE_BLOCK, gate_backward_kernel, gate_forward_kernel
from scalevit.kernels.gelu import POINTWISE_BLOCK, gelu_backward_kernel, gelu_forward_kernel
from scalevit.kernels.gelu_linear import linear_dgelu_kernel, linear_gelu_kernel
from scalevit.kernels.gemm import REDUCE_MANY, reduce_rows_kernel
from scalevit.kernels.tuning.tables import GATED, KEPT, TABLES, Table, Tile, read_table
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
    """One kernel to compile, as one kind of call of `fused_mlp` or `fused_gated_mlp` launches it.

    Attributes:
        arch, table: the architecture, and what names the tile: it, or "fallback"; "" without a tile.
        product: one of `tables.PRODUCTS`, one of `OF_GATES`, or a kernel without a tile, see `MLPS`.
        save: what the product writes or reads for the backward ("slope", "pre", "none").
        tile: the product's tile, or None.
        dtype: "bf16", "fp16" or "fp32".
        activation: "gelu", "gelu_tanh", or "silu", which plain MLPs do not have.
        bias: whether the product adds the biases of fc1 or fc2, or sums their gradients.
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
        pointwise = self.product in ("gelu", "dgelu", "gate", "dgate")
        gated = self.product in (*OF_GATES.values(), "gate", "dgate")
        activates = self.product in ("fc1", "gated_fc1", "gelu", "gate") or self.save == "pre"
        # fp32 products run in the library; of our kernels only the pointwise ones see fp32.
        if dtype == "fp32" and not pointwise:
            dtype = "fp16"
        # Plain MLPs have no SiLU, and what evaluates no activation is one kernel for all.
        if not activates or (activation == "silu" and not gated):
            activation = "gelu"
        # Tensors that are not aligned run on the fall-back's pointer tiles.
        if layout == "any" and self.table != "fallback":
            layout = "even"
        return replace(
            self,
            dtype=dtype,
            activation=activation,
            bias=bias and self.product in ("fc1", "fc2", "fc2_dgrad", "gated_fc1", "gated_fc2_dgrad"),
            layout=layout if self.tile else "aligned",
        )


# Kinds of calls: (dtype, activation, bias, layout).
EVERY_CALL = tuple(
    itertools.product(
        ("bf16", "fp16", "fp32"), ("silu", "gelu", "gelu_tanh"), (False, True), ("aligned", "even", "any")
    )
)
# Those with the least and the most work in a kernel.
LEAST_AND_MOST = (("bf16", "silu", False, "aligned"), ("fp32", "gelu_tanh", True, "any"))
# Kind of MLP -> how the names of its tables end, and its kernels without a tile, with what they save or read.
MLPS = {
    "plain": ("", (("gelu", "none"), ("gelu", "slope"), ("dgelu", "slope"), ("dgelu", "pre"), ("reduce", "none"))),
    "gated": (GATED, (("gate", "none"), ("gate", "slope"), ("dgate", "slope"), ("dgate", "pre"), ("reduce", "none"))),
}
# The products that gated MLPs have kernels of their own for.
OF_GATES = {product: f"gated_{product}" for product in ("fc1", "fc2_dgrad", "fc1_dgrad")}


def jobs_for(
    archs: list[str], *, mlps: Iterable[str] = tuple(MLPS), every: bool = False, tables: Path = TABLES
) -> list[CompileJob]:
    """The kernels that the tables in a folder can launch on these architectures, each once.

    mlps: of which kinds of MLPs, see `MLPS`.
    every: in all kinds of calls. Otherwise in two: the one with the least and the one with the most work.

    Raises:
        ValueError: a table is malformed.
    """
    launched = []
    for arch, mlp in itertools.product(archs, mlps):
        ending, without_tile = MLPS[mlp]
        for name in (arch, "fallback"):
            path = tables / f"{name}{ending}.json"
            if path.is_file():
                launched += [CompileJob(arch, name, *launch) for launch in _launches(read_table(path))]
        launched += [CompileJob(arch, "", product, save, None) for product, save in without_tile]
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
        name = OF_GATES.get(product, product) if table.gated else product
        # The number of programs does not change the code.
        yield name, save if product in ("fc1", "fc2_dgrad") else "none", replace(tile, ctas_per_sm=0)


def kernel_source(job: CompileJob) -> ASTSource:
    """The kernel with the signature, constants and divisibility with which its launcher calls it."""
    if job.tile is None:
        kernel, types, constants = _pointwise(job)
    else:
        kernel, types, constants = (_gated if job.product in OF_GATES.values() else _plain)(job, job.tile)
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


def _blocks(job: CompileJob, tile: Tile) -> Callable[[int, int], str]:
    """Makes the type of an operand that is read or written in blocks of these rows and columns."""
    if tile.descriptors:
        return lambda rows, cols: f"tensordesc<{job.dtype}[{rows}, {cols}]>"
    return lambda rows, cols: f"*{job.dtype}"


def _constants(tile: Tile) -> dict[str, object]:
    return {
        "BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k, "GROUP_M": tile.group_m,
        "PARTS": tile.parts, "DESCRIPTORS": tile.descriptors, "ACC": tl.float32, "PRECISION": "ieee",
    }  # fmt: skip


def _unit(job: CompileJob, *strides: str) -> dict[str, object]:
    """Inner strides, which are constants where the launcher knows them."""
    return dict.fromkeys(strides if job.layout != "any" else (), 1)


def _plain(job: CompileJob, tile: Tile) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
    """The kernel of a matrix product, the types of its pointers and descriptors, its constants."""
    pointer, block, constants = f"*{job.dtype}", _blocks(job, tile), _constants(tile)
    output = block(tile.block_m, tile.block_n // tile.parts)
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
    return kernel, types, constants | dict.fromkeys(unused) | _unit(job, *unit_strides)


def _gated(job: CompileJob, tile: Tile) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
    """The same for a product of `OF_GATES`."""
    block, constants = _blocks(job, tile), _constants(tile)
    left, right = block(tile.block_m, tile.block_k), block(tile.block_k, tile.block_n)
    output = block(tile.block_m, tile.block_n // tile.parts)
    if job.product == "gated_fc1_dgrad":
        types = {"a": left, "b": right, "c": left, "d": right, "out": output}
        unit = _unit(job, "stride_ak", "stride_bn", "stride_ck", "stride_dn")
        return sum_of_products_kernel, types, constants | unit
    constants |= {"ACTIVATION": job.activation, "EXACT": False}
    if job.product == "gated_fc1":
        weight = block(tile.block_n, tile.block_k)
        types = {"x": left, "gate": weight, "value": weight}
        types |= dict.fromkeys(("gate_bias", "value_bias"), f"*{job.dtype}")
        types |= dict.fromkeys(("post", "saved_gate", "saved_value"), output)
        constants |= {"SAVE": job.save, "HAS_GATE_BIAS": job.bias, "HAS_VALUE_BIAS": job.bias}
        unused = [*(["saved_gate", "saved_value"] if job.save == "none" else [])]
        unused += [] if job.bias else ["gate_bias", "value_bias"]
        unit = _unit(job, "stride_xk", "stride_gk", "stride_vk")
        return linear_gate_kernel, types, constants | dict.fromkeys(unused) | unit
    types = {"dy": left, "w": right, "gate_partials": "*fp32", "value_partials": "*fp32"}
    types |= dict.fromkeys(("saved_gate", "saved_value", "post", "dgate", "dvalue"), output)
    constants |= {"SAVED": job.save, "PARTIALS": job.bias}
    unused = [] if job.bias else ["gate_partials", "value_partials"]
    unused += ["post"] if job.save == "slope" else []
    return linear_dgate_kernel, types, constants | dict.fromkeys(unused) | _unit(job, "stride_dyk", "stride_wn")


def _pointwise(job: CompileJob) -> tuple[JITFunction, dict[str, str], dict[str, object]]:
    """The same for a kernel without a tile."""
    pointer = f"*{job.dtype}"
    if job.product == "reduce":
        block_p, block_n = REDUCE_MANY
        return reduce_rows_kernel, {"source": "*fp32", "target": pointer}, {"BP": block_p, "BN": block_n}
    constants: dict[str, object] = {
        "ACTIVATION": job.activation, "EXACT": job.dtype == "fp32", "ACC": tl.float32,
    }  # fmt: skip
    names = {
        "gelu": ("pre", "post", "slope"), "dgelu": ("dpost", "saved", "dpre", "post"),
        "gate": ("gate", "value", "post"), "dgate": ("dpost", "gate", "value", "dgate", "dvalue", "post"),
    }[job.product]  # fmt: skip
    if job.product in ("gelu", "dgelu"):
        constants |= {"BLOCK": POINTWISE_BLOCK}
    else:
        constants |= {"BM": GATE_BLOCK[0], "BN": GATE_BLOCK[1]}
    types = dict.fromkeys(names, pointer)
    if job.product == "gelu":
        return gelu_forward_kernel, types, constants | {"SAVE_SLOPE": job.save == "slope"}
    if job.product == "gate":
        return gate_forward_kernel, types, constants | {"SAVE_FACTORS": job.save == "slope"}
    unused = {} if job.save == "pre" else {"post": None}
    kernel = gelu_backward_kernel if job.product == "dgelu" else gate_backward_kernel
    return kernel, types, constants | {"SAVED": job.save} | unused
