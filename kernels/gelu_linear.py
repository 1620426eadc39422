"""The two fused GEMMs of the MLP, as Triton kernels and their launchers.

    linear_gelu    post = gelu(x @ w.T + b), and what the backward needs     fc1; with "none" any linear layer
    linear_dgelu   dpre = (dy @ w) * gelu'(pre), and bias sums per row block  fc2's dgrad; with "none" any dgrad
    reduce_rows    the second, deterministic stage of the bias gradient

One source serves every target: operands are read through tensor descriptors (TMA on Hopper and Blackwell) if the tile
asks for them and the alignment allows it, and through pointers with any strides otherwise. There are no atomics, so two
runs give bitwise equal results. Must not know anything but 2-D tensors and tiles: `products.py` uses these launchers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalevit.kernels.gelu import INTERPRET, accumulator_dtype, gelu_and_grad, numerics, round_to
from scalevit.kernels.tuning.tables import UNALIGNED, Tile

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
def _load(source, row, col, M, N, stride, BM: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr):
    if DESCRIPTORS:
        return source.load([row, col])
    else:
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        offsets = rows[:, None].to(tl.int64) * stride + cols[None, :]
        return tl.load(source + offsets, mask=(rows[:, None] < M) & (cols[None, :] < N), other=0.0)


@triton.jit
def _store(target, value, row, col, M, N, stride, BM: tl.constexpr, BN: tl.constexpr, DESCRIPTORS: tl.constexpr):
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
def _matmul_tile(
    a, b, row, col, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[row:row+BM, :] @ b[:, col:col+BN] in ACC; B_TRANSPOSED: a `b` read through a descriptor is (N, K) in memory."""
    acc = tl.zeros((BM, BN), ACC)
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
def _column_parts(acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
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
def _linear_gelu_epilogue(
    acc, bias, post, saved, row, col, M, N, stride_post, stride_saved,
    BM: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    if HAS_BIAS:
        cols = col + tl.arange(0, BN)
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(acc.dtype)[None, :]
    if SAVE == "pre":
        # The backward reads only the rounded value, so the forward uses the same one.
        kept = round_to(acc, saved.dtype if DESCRIPTORS else saved.dtype.element_ty)
        _store(saved, kept, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
        acc = kept.to(acc.dtype)
    value, slope = gelu_and_grad(acc, ACTIVATION, EXACT)
    if SAVE == "slope":
        _store(saved, slope, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
    _store(post, value, row, col, M, N, stride_post, BM, BN, DESCRIPTORS)


@triton.jit
def linear_gelu_kernel(
    x, w, bias, post, saved, M, N, K,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_post, stride_saved,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """post (M, N) = act(x (M, K) @ w (N, K).T + bias); saves "pre", act'(pre) ("slope") or "none"."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BM
        col = tile_n * BN
        acc = _matmul_tile(
            x, w, row, col, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
            BM, BN, BK, True, DESCRIPTORS, ACC, PRECISION,
        )  # fmt: skip
        parts = _column_parts(acc, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            _linear_gelu_epilogue(
                parts[p], bias, post, saved, row, col + p * (BN // PARTS), M, N, stride_post, stride_saved,
                BM, BN // PARTS, ACTIVATION, SAVE, HAS_BIAS, DESCRIPTORS, EXACT,
            )  # fmt: skip


@triton.jit
def _linear_dgelu_epilogue(
    acc, saved, post, dpre, partials, tile_m, row, col, M, N, stride_saved, stride_post, stride_dpre,
    BM: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVED: tl.constexpr, PARTIALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    if SAVED == "slope":
        acc *= _load(saved, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS).to(acc.dtype)
    elif SAVED == "pre":
        pre = _load(saved, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS).to(acc.dtype)
        value, slope = gelu_and_grad(pre, ACTIVATION, EXACT)
        acc *= slope
    _store(dpre, acc, row, col, M, N, stride_dpre, BM, BN, DESCRIPTORS)
    if PARTIALS:
        # Rows beyond M are zero: dy was loaded as zero there.
        cols = col + tl.arange(0, BN)
        tl.store(partials + tile_m.to(tl.int64) * N + cols, tl.sum(acc, 0), mask=cols < N)
    if SAVED == "pre":
        _store(post, value, row, col, M, N, stride_post, BM, BN, DESCRIPTORS)


@triton.jit
def linear_dgelu_kernel(
    dy, w, saved, post, dpre, partials, M, N, K,
    stride_dym, stride_dyk, stride_wk, stride_wn, stride_saved, stride_post, stride_dpre,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVED: tl.constexpr, PARTIALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dpre (M, N) = (dy (M, K) @ w (K, N)) * slope; `saved` is the slope, or pre, which also gives `post`.

    partials: (cdiv(M, BM), N), the column sums of dpre in ACC over each row block.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BM
        col = tile_n * BN
        acc = _matmul_tile(
            dy, w, row, col, M, N, K, stride_dym, stride_dyk, stride_wk, stride_wn,
            BM, BN, BK, False, DESCRIPTORS, ACC, PRECISION,
        )  # fmt: skip
        parts = _column_parts(acc, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            _linear_dgelu_epilogue(
                parts[p], saved, post, dpre, partials, tile_m, row, col + p * (BN // PARTS), M, N,
                stride_saved, stride_post, stride_dpre,
                BM, BN // PARTS, ACTIVATION, SAVED, PARTIALS, DESCRIPTORS, EXACT,
            )  # fmt: skip


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


def linear_gelu(
    x: Tensor, w: Tensor, bias: Tensor | None, *, activation: str, save: str, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """act(x @ w.T + bias) in one kernel.

    x: (M, K), w: (N, K), any strides; bias: (N,) contiguous, or None. activation: "gelu", "gelu_tanh" or "none".
    Returns post: (M, N) and, for save "pre" or "slope", the pre-activation or act' (M, N); for "none", None.
    """
    (m, k), n = x.shape, w.shape[0]
    post = torch.empty((m, n), dtype=x.dtype, device=x.device)
    saved = None if save == "none" else torch.empty_like(post)
    if m == 0:
        return post, saved
    tile = aligned_tile(tile, UNALIGNED, x, w, bias, post)
    part = tile.block_n // tile.parts
    if tile.descriptors:
        operands = (
            descriptor(x, tile.block_m, tile.block_k), descriptor(w, tile.block_n, tile.block_k), bias,
            descriptor(post, tile.block_m, part), descriptor(saved, tile.block_m, part),
        )  # fmt: skip
    else:
        operands = (x, w, bias, post, saved)  # type: ignore[assignment]
    linear_gelu_kernel[grid(tile, m, n, x.device)](
        *operands, m, n, k, x.stride(0), x.stride(1), w.stride(1), w.stride(0), n, n,
        ACTIVATION=activation, SAVE=save, HAS_BIAS=bias is not None, DESCRIPTORS=tile.descriptors,
        PRECISION=precision(x.dtype), **numerics(x.dtype), **blocks(tile),
    )  # fmt: skip
    return post, saved


def linear_dgelu(
    dy: Tensor, w: Tensor, saved: Tensor | None, *, activation: str, save: str, partial_sums: bool, tile: Tile
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dy @ w) * act'(pre) in one kernel.

    dy: (M, K), w: (K, N), any strides; saved: (M, N) contiguous, what `linear_gelu` returned for the same
    `save` ("slope", "pre"), or None for "none" (a plain matrix product). Returns dpre: (M, N); post: (M, N),
    recomputed if `save` is "pre", else None; with `partial_sums` the column sums of dpre over each row block,
    fp32 (fp64 for fp64), for `reduce_rows`, else None.
    """
    (m, k), n = dy.shape, w.shape[1]
    dpre = torch.empty((m, n), dtype=dy.dtype, device=dy.device)
    post = torch.empty_like(dpre) if save == "pre" else None
    tile = aligned_tile(tile, UNALIGNED, dy, w, dpre, saved)
    partials = None
    if partial_sums:
        rows = triton.cdiv(m, tile.block_m)
        partials = torch.empty((rows, n), dtype=accumulator_dtype(dy.dtype), device=dy.device)
    if m == 0:
        return dpre, post, partials
    part = tile.block_n // tile.parts
    if tile.descriptors:
        operands = (
            descriptor(dy, tile.block_m, tile.block_k), descriptor(w, tile.block_k, tile.block_n),
            descriptor(saved, tile.block_m, part), descriptor(post, tile.block_m, part),
            descriptor(dpre, tile.block_m, part), partials,
        )  # fmt: skip
    else:
        operands = (dy, w, saved, post, dpre, partials)  # type: ignore[assignment]
    linear_dgelu_kernel[grid(tile, m, n, dy.device)](
        *operands, m, n, k, dy.stride(0), dy.stride(1), w.stride(0), w.stride(1), n, n, n,
        ACTIVATION=activation, SAVED=save, PARTIALS=partial_sums, DESCRIPTORS=tile.descriptors,
        PRECISION=precision(dy.dtype), **numerics(dy.dtype), **blocks(tile),
    )  # fmt: skip
    return dpre, post, partials


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
