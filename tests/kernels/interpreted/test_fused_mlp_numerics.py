"""fused_mlp against fp64, by the criterion of `kernel_cases`, over shapes, dtypes, layouts and options."""

import random

import pytest
import torch

from kernel_cases import CASES, DTYPES, SAVES, Case, check_against_fp64, using_plan
from scalevit.kernels.tuning import tables


def by_turns(case: Case):
    """Of the cases with other rows or widths about half: every two of rows or width, dtype and save mode still meet."""
    varied = case.width or (case.rows[-1] if case.rows != Case.rows else None)
    turn = varied is None or (varied // 16 + DTYPES.index(case.dtype) + SAVES.index(case.save)) % 2 == 0
    return case if turn else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("case", map(by_turns, CASES), ids=str)
def test_error_below_twice_eager(case):
    fused = check_against_fp64(case)
    if case.width:
        _, _, dw1, db1, dw2, _ = fused
        for tail in (dw1[case.width :], db1[case.width :], dw2[:, case.width :]):
            assert not tail.any()


def test_vit_block():
    """ViT-B's own channels, 197 tokens, D = 768, with a shipped table's own tiles."""
    table = tables.read_table(tables.table_path("sm_90"))
    for save in ("fast", "lean"):
        with using_plan(table.default[save]):
            check_against_fp64(Case(rows=(197,), d=768, h=192, d_out=768, dtype=torch.bfloat16, save=save))


@pytest.mark.parametrize("seed", [7, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 14))])
def test_random_shapes(seed):
    """Twenty shapes nobody chose."""
    choose = random.Random(seed)
    for _ in range(20):
        h = choose.choice((choose.randint(1, 80), 16 * choose.randint(1, 5)))
        case = Case(
            rows=tuple(choose.randint(1, 12) for _ in range(choose.randint(1, 3))),
            d=choose.randint(1, 70),
            h=h,
            d_out=choose.randint(1, 70),
            width=16 * choose.randint(1, h // 16) if h >= 16 and choose.random() < 0.5 else None,
            save=choose.choice(SAVES),
            dtype=choose.choice((torch.float32, torch.bfloat16, torch.float16)),
            activation=choose.choice(("gelu", "gelu_tanh")),
            biases=(choose.random() < 0.7, choose.random() < 0.7),
        )
        check_against_fp64(case)
