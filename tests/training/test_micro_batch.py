"""The micro-batch "auto": what fits is found by halving, recorded with its conditions, and the same on every rank."""

from pathlib import Path

import pytest
import torch

from launching import QUICKSTART
from scalevit.config.loading import load_config
from scalevit.config.training import TrainConfig
from scalevit.errors import UserError
from scalevit.runs.folder import RunFolder
from scalevit.training.micro_batch import (
    CPU_MICRO_BATCH,
    TRAINING_KNOBS,
    first_micro_batch,
    largest_that_fits,
    naming_out_of_memory,
)


def test_on_a_cpu_it_is_a_fixed_number() -> None:
    assert load_config(QUICKSTART, ["train.micro_batch=auto"]).train.micro_batch == "auto"
    assert first_micro_batch(TrainConfig(micro_batch="auto")) == CPU_MICRO_BATCH
    assert first_micro_batch(TrainConfig(micro_batch=7)) == 7


@pytest.mark.parametrize(("guess", "limit", "found"), [(96, 1000, 96), (96, 50, 48), (96, 1, 1), (7, 3, 3)])
def test_a_guess_is_halved_until_it_fits(guess: int, limit: int, found: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_that_fits(guess, fits) == found
    assert tried[0] == guess


def test_not_even_one_image_is_one_line_with_the_knobs() -> None:
    with pytest.raises(UserError, match=r"one image .*train\.activation_checkpointing=true") as caught:
        largest_that_fits(4, lambda size: False)
    assert "\n" not in str(caught.value)


def test_lack_of_memory_later_is_one_line_with_the_knobs() -> None:
    expected = r"^out of memory with 12 images .*lower train\.micro_batch"
    with pytest.raises(UserError, match=expected) as caught, naming_out_of_memory(12, TRAINING_KNOBS):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")
    assert "\n" not in str(caught.value)


def test_what_was_found_is_used_again_under_the_same_conditions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=True)
    conditions = {"ranks": 2, "model": {"name": "x", "sizes": (1, 2)}}
    assert folder.read_micro_batch(conditions) is None
    folder.write_micro_batch(conditions, 48)
    assert folder.read_micro_batch(conditions) == 48
    assert folder.read_micro_batch(conditions | {"ranks": 4}) is None
    (tmp_path / "run" / "micro_batch.json").write_text("{")
    assert folder.read_micro_batch(conditions) is None
