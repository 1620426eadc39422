"""The weight gradient dy.T @ x as a Triton kernel, split over tokens with a fixed-order sum.

A weight gradient has a small result (768 x 3072) and a long inner dimension (50,432 tokens): its 72 tiles of
128 x 256 occupy 55 % of an H200's SMs. Splitting the tokens occupies all. The splits' partial results are added in a
fixed order by `reduce_rows`, so the result does not depend on scheduling. The tuner decides for each shape whether this
is faster than torch's product. That has not been measured yet, so the shipped tables choose torch's.
Must not know anything but 2-D tensors and tiles.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalevit.kernels.gelu import accumulator_dtype, numerics, round_to
from scalevit.kernels.gemm import aligned_tile, blocks, descriptor, dot, grid, precision, reduce_rows, tile_of
from scalevit.kernels.tuning.tables import UNALIGNED_WGRAD, Tile


@triton.jit
def weight_grad_kernel(
    dy, x, out, M, N, K,
    stride_dym, stride_dyn, stride_xm, stride_xk, stride_split, stride_out, rows_per_split,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[split] (N, K) = dy (M, N).T @ x (M, K) over the split's rows, a multiple of BK of them.

    BM and BN divide N and K, BK divides tokens. PARTS is not used: the epilogue needs no temporaries.
    """
    tiles_n = tl.cdiv(N, BM)
    tiles_k = tl.cdiv(K, BN)
    tiles = tiles_n * tiles_k
    for index in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0), flatten=False):
        split = index // tiles
        tile_n, tile_k = tile_of(index % tiles, tiles_n, tiles_k, GROUP_M)
        rows = tile_n * BM + tl.arange(0, BM)
        cols = tile_k * BN + tl.arange(0, BN)
        first = split * rows_per_split
        last = min(M, first + rows_per_split)
        acc = tl.zeros((BM, BN), ACC)
        for m in range(first, last, BK):
            if DESCRIPTORS:
                acc = dot(dy.load([m, tile_n * BM]).T, x.load([m, tile_k * BN]), acc, PRECISION)
            else:
                tokens = m + tl.arange(0, BK)
                dy_at = dy + tokens[None, :].to(tl.int64) * stride_dym + rows[:, None] * stride_dyn
                x_at = x + tokens[:, None].to(tl.int64) * stride_xm + cols[None, :] * stride_xk
                left = tl.load(dy_at, mask=(rows[:, None] < N) & (tokens[None, :] < last), other=0.0)
                right = tl.load(x_at, mask=(tokens[:, None] < last) & (cols[None, :] < K), other=0.0)
                acc = dot(left, right, acc, PRECISION)
        at = out + split.to(tl.int64) * stride_split + rows[:, None].to(tl.int64) * stride_out + cols[None, :]
        tl.store(at, round_to(acc, out.dtype.element_ty), mask=(rows[:, None] < N) & (cols[None, :] < K))


def weight_grad(dy: Tensor, x: Tensor, out: Tensor, *, tile: Tile) -> None:
    """out (N, K) = dy.T @ x, rounded once to out's dtype.

    dy: (M, N) and x: (M, K), any strides; out: unit inner stride, any row stride.
    """
    (m, n), k = dy.shape, x.shape[1]
    if m == 0:
        out.zero_()
        return
    written = out if tile.splits == 1 else None
    tile = aligned_tile(tile, replace(UNALIGNED_WGRAD, splits=tile.splits), dy, x, written)
    rows = triton.cdiv(triton.cdiv(m, tile.splits), tile.block_k) * tile.block_k
    target, stride_split, stride_out = out, 0, out.stride(0)
    if tile.splits > 1:
        target = torch.empty((tile.splits, n, k), dtype=accumulator_dtype(dy.dtype), device=dy.device)
        stride_split, stride_out = n * k, k
    operands: tuple = (dy, x)
    if tile.descriptors:
        operands = (descriptor(dy, tile.block_k, tile.block_m), descriptor(x, tile.block_k, tile.block_n))
    weight_grad_kernel[grid(tile, n, k, dy.device)](
        *operands, target, m, n, k, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1),
        stride_split, stride_out, rows, DESCRIPTORS=tile.descriptors, ACC=numerics(dy.dtype)["ACC"],
        PRECISION=precision(dy.dtype), SPLITS=tile.splits, **blocks(tile),
    )  # fmt: skip
    if tile.splits > 1:
        reduce_rows(target.view(tile.splits, n * k), out)
