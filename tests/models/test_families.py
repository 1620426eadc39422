"""Every family of timm's transformers: the table of docs/models.md, and three steps of those that work."""

import family_cases
import pytest
import torch
from family_cases import BEGIN, CASES, END, PAGE, REDUCTIONS, Case, Outcome
from torch import Tensor

from scalevit.models.mlps import mlp_places, transformer_blocks


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    return {case: family_cases.outcome_of(case) for case in CASES}


def test_the_page_has_the_table(outcomes: dict[Case, Outcome]) -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == family_cases.table(outcomes), "run tests/models/family_cases.py"


def test_at_least_twenty_families_can_be_reduced(outcomes: dict[Case, Outcome]) -> None:
    assert sum(not outcome.obstacles for outcome in outcomes.values()) >= 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_steps(case: Case, outcomes: dict[Case, Outcome]) -> None:
    sizes = {}
    for label in REDUCTIONS.keys() - outcomes[case].obstacles:
        state = torch.get_rng_state()
        before, after, model = family_cases.train(case, REDUCTIONS[label])
        assert torch.equal(torch.get_rng_state(), state), "a layer draws random numbers that do not follow from keys"
        assert after < before, label
        sizes[label] = sum(parameter.numel() for parameter in model.parameters())
        places = [mlp_places(block) for block in transformer_blocks(model)]
        if label == "grouped":
            assert all(
                own.module is other.module
                for one, two in zip(places[::2], places[1::2], strict=True)
                for own, other in zip(one, two, strict=True)
            )
        for mlp in {place.module for own in places for place in own}:
            gradients: list[Tensor | None] = [parameter.grad for parameter in mlp.parameters()]
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients), label
    for label in sizes.keys() - {"none"}:
        assert sizes[label] < sizes["none"], label
