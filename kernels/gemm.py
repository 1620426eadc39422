"""What the Triton matrix products share: device functions on tiles, the sum over row blocks, launch arguments.

One source serves every target: operands are read through tensor descriptors (TMA on Hopper and Blackwell) if the tile
asks for them and the alignment allows it, and through pointers with any strides otherwise. There are no atomics, so two
runs give bitwise equal results. Must not know anything but 2-D tensors and tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalevit.kernels.gelu import INTERPRET, round_to
from scalevit.kernels.tuning.tables import Tile

INTERPRETED: bool = INTERPRET.value
# Number of SMs that the interpreter assumes: few, so that persistent programs loop in small problems too.
INTERPRETED_SMS = 2


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M row blocks go through the columns together, so that the weights stay in L2."""
    per_group = GROUP_M * tiles_n
    first = (index // per_group) * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + (index % per_group) % rows, (index % per_group) // rows


@triton.jit
def load_tile(source, row, col, M, N, stride, BM: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    if DESCRIPTORS:
        return source.load([row, col])
    else:
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        offsets = rows[:, None].to(tl.int64) * stride + cols[None, :]
        return tl.load(source + offsets, mask=(rows[:, None] < M) & (cols[None, :] < N), other=0.0)


@triton.jit
def store_tile(target, value, row, col, M, N, stride, BM: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    rounded = round_to(value, target.dtype if DESCRIPTORS else target.dtype.element_ty)
    if DESCRIPTORS:
        target.store([row, col], rounded)
    else:
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        offsets = rows[:, None].to(tl.int64) * stride + cols[None, :]
        tl.store(target + offsets, rounded, mask=(rows[:, None] < M) & (cols[None, :] < N))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def matmul_tile(
    acc, a, b, row, col, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a[row:row+BM, :] @ b[:, col:col+BN]; B_TRANSPOSED: a `b` read through a descriptor is (N, K) in memory."""
    if DESCRIPTORS:
        for k in range(0, K, BK):
            if B_TRANSPOSED:
                acc = dot(a.load([row, k]), b.load([col, k]).T, acc, PRECISION)
            else:
                acc = dot(a.load([row, k]), b.load([k, col]), acc, PRECISION)
    else:
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        ks = tl.arange(0, BK)
        a_at = a + rows[:, None].to(tl.int64) * stride_am + ks[None, :] * stride_ak
        b_at = b + ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
        for k in range(0, K, BK):
            a_block = tl.load(a_at, mask=(rows[:, None] < M) & (ks[None, :] < K - k), other=0.0)
            b_block = tl.load(b_at, mask=(ks[:, None] < K - k) & (cols[None, :] < N), other=0.0)
            acc = dot(a_block, b_block, acc, PRECISION)
            a_at += BK * stride_ak
            b_at += BK * stride_bk
    return acc


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def column_parts(acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """An accumulator as PARTS (1, 2 or 4) blocks of columns, left to right, split in registers.

    The epilogue then holds the temporaries of one part at a time; for whole tiles it would spill registers.
    """
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 1:
        return (acc,)
    else:
        left, right = _halves(acc, BM, BN)
        if PARTS == 2:
            return left, right
        else:
            a, b = _halves(left, BM, BN // 2)
            c, d = _halves(right, BM, BN // 2)
            return a, b, c, d


@triton.jit
def reduce_rows_kernel(source, target, P, N, width, stride, BP: tl.constexpr, BN: tl.constexpr):
    """Sums source (P, N) over its rows, in an order that depends only on P.

    Column n goes to target[n // width, n % width], rows of target being `stride` elements apart.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BP)
    acc = tl.zeros((BP, BN), source.dtype.element_ty)
    for p in range(0, P, BP):
        offsets = (p + rows)[:, None].to(tl.int64) * N + cols[None, :]
        acc += tl.load(source + offsets, mask=((p + rows)[:, None] < P) & (cols[None, :] < N), other=0.0)
    at = target + (cols // width).to(tl.int64) * stride + cols % width
    tl.store(at, round_to(tl.sum(acc, 0), target.dtype.element_ty), mask=cols < N)


# ---------------------------------------------------------------------------------------------- launchers


def aligned_tile(tile: Tile, unaligned: Tile, *tensors: Tensor | None) -> Tile:
    """The tile if every tensor meets the requirements of wide loads and descriptors, else the pointer tile `unaligned`.

    The requirements: a base address divisible by 16 bytes, unit inner stride, and for (M, N) a row length and a row
    stride divisible by 16 elements. The compile report checks tiles for such tensors, and the unaligned ones for any.
    """
    aligned = all(
        t is None
        or (
            t.data_ptr() % 16 == 0
            and t.stride(-1) == 1
            and (t.dim() == 1 or (t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.stride(0) > 0))
        )
        for t in tensors
    )
    return tile if aligned else unaligned


def descriptor(tensor: Tensor | None, rows: int, cols: int) -> TensorDescriptor | None:
    if tensor is None:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, cols])


def precision(dtype: torch.dtype) -> str:
    """The precision of an fp32 product, from torch's own setting. Other dtypes have only one."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def grid(tile: Tile, m: int, n: int, device: torch.device) -> tuple[int]:
    """Number of programs for an (m, n) result: one per tile and split, or a fixed number of persistent ones per SM."""
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) * tile.splits
    if tile.ctas_per_sm == 0:
        return (tiles,)
    if device.type == "cpu":
        sms = INTERPRETED_SMS
    else:
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    return (min(tiles, sms * tile.ctas_per_sm),)


def blocks(tile: Tile) -> dict[str, int]:
    """The tile as a kernel's constexprs and launch options."""
    return {
        "BM": tile.block_m, "BN": tile.block_n, "BK": tile.block_k, "GROUP_M": tile.group_m,
        "PARTS": tile.parts, "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip


# Rows and columns that one step of the sum over many row blocks reads.
REDUCE_MANY = (16, 64)


def reduce_rows(partials: Tensor, out: Tensor) -> None:
    """out = partials.sum(0), always in the same order, rounded once to out's dtype.

    partials: (P, N) contiguous; out: (N,), or (R, C) with R * C = N and any row stride.
    """
    p, n = partials.shape
    width, stride = (n, n) if out.dim() == 1 else (out.shape[1], out.stride(0))
    block_p, block_n = REDUCE_MANY if p > 16 else (triton.next_power_of_2(max(p, 1)), 256)
    reduce_rows_kernel[(triton.cdiv(n, block_n),)](
        partials, out, p, n, width, stride, BP=block_p, BN=block_n, num_warps=4
    )
