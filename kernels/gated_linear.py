"""The fused GEMMs of a gated MLP, as Triton kernels and their launchers.

    linear_gate      post = act(x @ g.T + b) * (x @ v.T + c), in one pass over x, and what the backward needs
    linear_dgate     fc2's dgrad, dy @ w, turned into the gradients of gate and value, and bias sums per row block
    sum_of_products  the gradient of x: dgate @ g + dvalue @ v, added up in one accumulator

Gate and value are halves of one (M, 2N) buffer or weight, or separate tensors; each is an operand of its own, so that
a tile at the edge of one never reaches into the other. Must not know anything but 2-D tensors and tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalevit.kernels.gating import gate_and_grad
from scalevit.kernels.gelu import accumulator_dtype, numerics, round_to
from scalevit.kernels.gemm import (
    aligned_tile,
    blocks,
    column_parts,
    descriptor,
    dot,
    grid,
    load_tile,
    matmul_tile,
    precision,
    store_tile,
    tile_of,
)
from scalevit.kernels.tuning.tables import UNALIGNED, Tile


@triton.jit
def _two_matmul_tiles(
    first, second, a, b, c, row, col, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_ck, stride_cn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`matmul_tile` of a with b and of a with c, loading a once. b and c read through a descriptor are (N, K)."""
    if DESCRIPTORS:
        for k in range(0, K, BK):
            a_block = a.load([row, k])
            first = dot(a_block, b.load([col, k]).T, first, PRECISION)
            second = dot(a_block, c.load([col, k]).T, second, PRECISION)
    else:
        rows = row + tl.arange(0, BM)
        cols = col + tl.arange(0, BN)
        ks = tl.arange(0, BK)
        a_at = a + rows[:, None].to(tl.int64) * stride_am + ks[None, :] * stride_ak
        b_at = b + ks[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
        c_at = c + ks[:, None].to(tl.int64) * stride_ck + cols[None, :].to(tl.int64) * stride_cn
        for k in range(0, K, BK):
            within = (ks[:, None] < K - k) & (cols[None, :] < N)
            a_block = tl.load(a_at, mask=(rows[:, None] < M) & (ks[None, :] < K - k), other=0.0)
            first = dot(a_block, tl.load(b_at, mask=within, other=0.0), first, PRECISION)
            second = dot(a_block, tl.load(c_at, mask=within, other=0.0), second, PRECISION)
            a_at += BK * stride_ak
            b_at += BK * stride_bk
            c_at += BK * stride_ck
    return first, second


@triton.jit
def _linear_gate_epilogue(
    gate, value, gate_bias, value_bias, post, saved_gate, saved_value, row, col, M, N, stride_post, stride_saved,
    BM: tl.constexpr, BN: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    cols = col + tl.arange(0, BN)
    if HAS_GATE_BIAS:
        gate += tl.load(gate_bias + cols, mask=cols < N, other=0.0).to(gate.dtype)[None, :]
    if HAS_VALUE_BIAS:
        value += tl.load(value_bias + cols, mask=cols < N, other=0.0).to(value.dtype)[None, :]
    if SAVE == "pre":
        # The backward reads only the rounded values, so the forward uses the same ones.
        kept_gate = round_to(gate, saved_gate.dtype if DESCRIPTORS else saved_gate.dtype.element_ty)
        kept_value = round_to(value, saved_value.dtype if DESCRIPTORS else saved_value.dtype.element_ty)
        store_tile(saved_gate, kept_gate, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
        store_tile(saved_value, kept_value, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
        gate = kept_gate.to(gate.dtype)
        value = kept_value.to(value.dtype)
    activated, slope = gate_and_grad(gate, ACTIVATION, EXACT)
    if SAVE == "slope":
        store_tile(saved_gate, value * slope, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
        store_tile(saved_value, activated, row, col, M, N, stride_saved, BM, BN, DESCRIPTORS)
    store_tile(post, activated * value, row, col, M, N, stride_post, BM, BN, DESCRIPTORS)


@triton.jit
def linear_gate_kernel(
    x, gate, value, gate_bias, value_bias, post, saved_gate, saved_value, M, N, K,
    stride_xm, stride_xk, stride_gk, stride_gn, stride_vk, stride_vn, stride_post, stride_saved,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_VALUE_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """post (M, N) = act(x (M, K) @ gate (N, K).T + gate_bias) * (x @ value (N, K).T + value_bias).

    Saves "pre" (both sums), "slope" (the factors of the backward, see `gate_forward_kernel`) or "none".
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BM
        col = tile_n * BN
        gate_sum, value_sum = _two_matmul_tiles(
            tl.zeros((BM, BN), ACC), tl.zeros((BM, BN), ACC), x, gate, value, row, col, M, N, K,
            stride_xm, stride_xk, stride_gk, stride_gn, stride_vk, stride_vn, BM, BN, BK, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        gates = column_parts(gate_sum, BM, BN, PARTS)
        values = column_parts(value_sum, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            _linear_gate_epilogue(
                gates[p], values[p], gate_bias, value_bias, post, saved_gate, saved_value, row, col + p * (BN // PARTS),
                M, N, stride_post, stride_saved, BM, BN // PARTS,
                ACTIVATION, SAVE, HAS_GATE_BIAS, HAS_VALUE_BIAS, DESCRIPTORS, EXACT,
            )  # fmt: skip


@triton.jit
def _dgate_part(
    acc, factor, gradient, partials, tile_m, row, col, M, N, stride, BM: tl.constexpr, BN: tl.constexpr,
    PARTIALS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    acc *= factor
    store_tile(gradient, acc, row, col, M, N, stride, BM, BN, DESCRIPTORS)
    if PARTIALS:
        # Rows beyond M are zero: dy was loaded as zero there.
        cols = col + tl.arange(0, BN)
        tl.store(partials + tile_m.to(tl.int64) * N + cols, tl.sum(acc, 0), mask=cols < N)


@triton.jit
def _linear_dgate_epilogue(
    acc, saved_gate, saved_value, post, dgate, dvalue, gate_partials, value_partials, tile_m, row, col, M, N,
    stride_hidden, stride_post, BM: tl.constexpr, BN: tl.constexpr, ACTIVATION: tl.constexpr, SAVED: tl.constexpr,
    PARTIALS: tl.constexpr, DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    gate_factor = load_tile(saved_gate, row, col, M, N, stride_hidden, BM, BN, DESCRIPTORS).to(acc.dtype)
    value_factor = load_tile(saved_value, row, col, M, N, stride_hidden, BM, BN, DESCRIPTORS).to(acc.dtype)
    if SAVED == "pre":
        activated, slope = gate_and_grad(gate_factor, ACTIVATION, EXACT)
        store_tile(post, activated * value_factor, row, col, M, N, stride_post, BM, BN, DESCRIPTORS)
        gate_factor = value_factor * slope
        value_factor = activated
    _dgate_part(
        acc, gate_factor, dgate, gate_partials, tile_m, row, col, M, N, stride_hidden, BM, BN, PARTIALS, DESCRIPTORS
    )
    _dgate_part(
        acc, value_factor, dvalue, value_partials, tile_m, row, col, M, N, stride_hidden, BM, BN, PARTIALS, DESCRIPTORS
    )


@triton.jit
def linear_dgate_kernel(
    dy, w, saved_gate, saved_value, post, dgate, dvalue, gate_partials, value_partials, M, N, K,
    stride_dym, stride_dyk, stride_wk, stride_wn, stride_hidden, stride_post,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr, SAVED: tl.constexpr, PARTIALS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgate and dvalue (M, N) = dy (M, K) @ w (K, N), each times its factor.

    The saved tensors are the factors, or "pre", which also gives `post`; they and the gradients have one row stride.
    gate_partials, value_partials: (cdiv(M, BM), N), the column sums of the gradients in ACC over each row block.
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
            _linear_dgate_epilogue(
                parts[p], saved_gate, saved_value, post, dgate, dvalue, gate_partials, value_partials,
                tile_m, row, col + p * (BN // PARTS), M, N, stride_hidden, stride_post,
                BM, BN // PARTS, ACTIVATION, SAVED, PARTIALS, DESCRIPTORS, EXACT,
            )  # fmt: skip


@triton.jit
def sum_of_products_kernel(
    a, b, c, d, out, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_ck, stride_dk, stride_dn, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, K) @ b (K, N) + c (M, K) @ d (K, N), rounded once."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BM
        col = tile_n * BN
        acc = matmul_tile(
            tl.zeros((BM, BN), ACC), a, b, row, col, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
            BM, BN, BK, False, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        acc = matmul_tile(
            acc, c, d, row, col, M, N, K, stride_cm, stride_ck, stride_dk, stride_dn,
            BM, BN, BK, False, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        parts = column_parts(acc, BM, BN, PARTS)
        for p in tl.static_range(PARTS):
            part_col = col + p * (BN // PARTS)
            store_tile(out, parts[p], row, part_col, M, N, stride_out, BM, BN // PARTS, DESCRIPTORS)


# ---------------------------------------------------------------------------------------------- launchers


def linear_gate(
    x: Tensor, weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor] | None, *, activation: str, save: str, tile: Tile,
) -> Tensor:  # fmt: skip
    """post (M, N) = act(x @ gate.T + bias) * (x @ value.T + bias) in one kernel.

    x: (M, K); weights: gate and value (N, K), any strides; biases: (N,) contiguous, or None. saved: what is filled for
    `save` "pre" or "slope", for gate and value (M, N) with one row stride and unit inner strides; None for "none".
    activation: as in `gate_and_grad`.
    """
    (m, k), (gate, value) = x.shape, weights
    n = gate.shape[0]
    post = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return post
    tile = aligned_tile(tile, UNALIGNED, x, gate, value, *biases, post, *(saved or ()))
    part = tile.block_n // tile.parts
    operands: tuple = (x, gate, value, *biases, post, *(saved or (None, None)))
    if tile.descriptors:
        operands = (
            descriptor(x, tile.block_m, tile.block_k), *(descriptor(w, tile.block_n, tile.block_k) for w in weights),
            *biases, descriptor(post, tile.block_m, part),
            *(descriptor(t, tile.block_m, part) for t in saved or (None, None)),
        )  # fmt: skip
    linear_gate_kernel[grid(tile, m, n, x.device)](
        *operands, m, n, k, x.stride(0), x.stride(1), gate.stride(1), gate.stride(0), value.stride(1), value.stride(0),
        n, saved[0].stride(0) if saved else 0, ACTIVATION=activation, SAVE=save,
        HAS_GATE_BIAS=biases[0] is not None, HAS_VALUE_BIAS=biases[1] is not None, DESCRIPTORS=tile.descriptors,
        PRECISION=precision(x.dtype), **numerics(x.dtype), **blocks(tile),
    )  # fmt: skip
    return post


def linear_dgate(
    dy: Tensor, w: Tensor, saved: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], *,
    activation: str, save: str, partial_sums: bool, tile: Tile,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fills the gradients of gate and value from (dy @ w), in one kernel.

    dy: (M, K), w: (K, N), any strides; saved: what `linear_gate` filled for the same `save`, "slope" or "pre";
    gradients: like saved, with the same row stride. Returns post: (M, N), recomputed if `save` is "pre", else None; and
    with `partial_sums` (2, P, N), the column sums of both gradients over each of P row blocks, fp32 (fp64 for fp64),
    for `reduce_rows`, else None.
    """
    (m, k), n = dy.shape, w.shape[1]
    post = torch.empty((m, n), dtype=dy.dtype, device=dy.device) if save == "pre" else None
    tile = aligned_tile(tile, UNALIGNED, dy, w, *saved, *gradients)
    partials = None
    if partial_sums:
        rows = triton.cdiv(m, tile.block_m)
        partials = torch.empty((2, rows, n), dtype=accumulator_dtype(dy.dtype), device=dy.device)
    if m == 0:
        return post, partials
    part = tile.block_n // tile.parts
    operands: tuple = (dy, w, *saved, post, *gradients)
    if tile.descriptors:
        operands = (
            descriptor(dy, tile.block_m, tile.block_k), descriptor(w, tile.block_k, tile.block_n),
            *(descriptor(t, tile.block_m, part) for t in (*saved, post, *gradients)),
        )  # fmt: skip
    linear_dgate_kernel[grid(tile, m, n, dy.device)](
        *operands, *((None, None) if partials is None else partials), m, n, k,
        dy.stride(0), dy.stride(1), w.stride(0), w.stride(1), saved[0].stride(0), n,
        ACTIVATION=activation, SAVED=save, PARTIALS=partial_sums, DESCRIPTORS=tile.descriptors,
        PRECISION=precision(dy.dtype), **numerics(dy.dtype), **blocks(tile),
    )  # fmt: skip
    return post, partials


def sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, tile: Tile) -> Tensor:
    """a @ b + c @ d: (M, N), in one kernel; a, c: (M, K), b, d: (K, N), any strides."""
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    if m == 0:
        return out
    tile = aligned_tile(tile, UNALIGNED, a, b, c, d, out)
    operands: tuple = (a, b, c, d, out)
    if tile.descriptors:
        left, right = (tile.block_m, tile.block_k), (tile.block_k, tile.block_n)
        operands = (
            descriptor(a, *left), descriptor(b, *right), descriptor(c, *left), descriptor(d, *right),
            descriptor(out, tile.block_m, tile.block_n // tile.parts),
        )  # fmt: skip
    sum_of_products_kernel[grid(tile, m, n, a.device)](
        *operands, m, n, k, *a.stride(), *b.stride(), *c.stride(), *d.stride(), n,
        DESCRIPTORS=tile.descriptors, ACC=numerics(a.dtype)["ACC"], PRECISION=precision(a.dtype), **blocks(tile),
    )  # fmt: skip
    return out
