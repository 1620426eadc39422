"""Which tile each piece of the MLP runs with. (Stage 1: one table in code.)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One launch configuration of a GEMM kernel.

    block_m, block_n, block_k: the tile, in elements. warps, stages: Triton's. parts: column parts of the
    epilogue (1, 2 or 4). group_m: row blocks that share a column sweep (L2 reuse). descriptors: load and
    store through tensor descriptors (TMA on Hopper) where alignment allows. ctas_per_sm: persistent
    programs for each SM; 0 launches one program for each tile.
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


INTERPRETER = Tile(32, 32, 32, parts=2, group_m=2, ctas_per_sm=2)
