"""The two fused GEMMs of the MLP, as Triton kernels and their launchers.

    linear_gelu    post = gelu(x @ w.T + b), and what the backward needs     fc1; with "none" any linear layer
    linear_dgelu   dpre = (dy @ w) * gelu'(pre), and bias sums per row block  fc2's dgrad; with "none" any dgrad

Must not know anything but 2-D tensors and tiles: `products.py` uses these launchers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalevit.kernels.gelu import accumulator_dtype, gelu_and_grad, numerics, round_to
from scalevit.kernels.gemm import (
    aligned_tile,
    blocks,
    column_parts,
    descriptor,
    grid,
    load_tile,
    matmul_tile,
    precision,
    store_tile,
    tile_of,
)
from scalevit.kernels.tuning.tables import UNALIGNED, Tile


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
        store_tile(saved, kept, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
        acc = kept.to(acc.dtype)
    value, slope = gelu_and_grad(acc, ACTIVATION, EXACT)
    if SAVE == "slope":
        store_tile(saved, slope, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
    store_tile(post, value, row, col, M, N, stride_post, BM, BN, DESCRIPTORS)


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
        acc = matmul_tile(
            tl.zeros((BM, BN), ACC), x, w, row, col, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn,
            BM, BN, BK, True, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        parts = column_parts(acc, BM, BN, PARTS)
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
        acc *= load_tile(saved, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS).to(acc.dtype)
    elif SAVED == "pre":
        pre = load_tile(saved, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS).to(acc.dtype)
        value, slope = gelu_and_grad(pre, ACTIVATION, EXACT)
        acc *= slope
    store_tile(dpre, acc, row, col, M, N, stride_dpre, BM, BN, DESCRIPTORS)
    if PARTIALS:
        # Rows beyond M are zero: dy was loaded as zero there.
        cols = col + tl.arange(0, BN)
        tl.store(partials + tile_m.to(tl.int64) * N + cols, tl.sum(acc, 0), mask=cols < N)
    if SAVED == "pre":
        store_tile(post, value, row, col, M, N, stride_post, BM, BN, DESCRIPTORS)


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
        acc = matmul_tile(
            tl.zeros((BM, BN), ACC), dy, w, row, col, M, N, K, stride_dym, stride_dyk, stride_wk, stride_wn,
            BM, BN, BK, False, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        parts = column_parts(acc, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            _linear_dgelu_epilogue(
                parts[p], saved, post, dpre, partials, tile_m, row, col + p * (BN // PARTS), M, N,
                stride_saved, stride_post, stride_dpre,
                BM, BN // PARTS, ACTIVATION, SAVED, PARTIALS, DESCRIPTORS, EXACT,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------- launchers


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
