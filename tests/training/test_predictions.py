"""What is kept of an evaluation: counts by class, images at equal distances, the surest mistakes; no padding."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from scalevit.distributed import World
from scalevit.training.metrics import Predictions
from scalevit.training.predictions import MOST_CLASSES, PredictionLog

ALONE = World(rank=0, size=1, local_rank=0, ranks_per_node=1, device=torch.device("cpu"))
ROWS, CLASSES, IMAGES = 40, 4, 5


def made() -> tuple[torch.Tensor, Predictions, torch.Tensor]:
    """40 rows: the pixels of row i have the value i; row 3 cannot be decoded, and the last two are padding."""
    torch.manual_seed(0)
    pixels = torch.arange(ROWS, dtype=torch.uint8)[:, None, None, None].expand(ROWS, 3, 8, 8).clone()
    decoded = torch.ones(ROWS, dtype=torch.bool)
    decoded[3] = False
    weights = torch.ones(ROWS, dtype=torch.float64)
    weights[-2:] = 0
    predictions = Predictions(torch.randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,)), decoded)
    return pixels, predictions, weights


def logged(batch: int, images: int = IMAGES) -> dict:
    pixels, whole, weights = made()
    log = PredictionLog(images, ROWS)
    for start in range(0, ROWS, batch):
        rows = slice(start, start + batch)
        part = Predictions(whole.logits[rows], whole.labels[rows], whole.decoded[rows])
        buffer = pixels[rows].clone()
        log.add(buffer, part, weights[rows])
        buffer.zero_()  # as loaders do: a batch's memory is used again
    return log.to_record(ALONE)


def value(record: dict) -> int:
    """Of the image's pixels, which is the number of its row."""
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(record["png"]))))[0, 0, 0])


@pytest.mark.parametrize("batch", [ROWS, 7, 1])
def test_it_is_what_numpy_counts_however_the_rows_are_split(batch: int) -> None:
    _, whole, weights = made()
    probabilities = torch.softmax(whole.logits, 1).numpy()
    labels, predicted = whole.labels.numpy(), probabilities.argmax(1)
    counted = whole.decoded.numpy() & (weights.numpy() > 0)
    expected = np.zeros((CLASSES, CLASSES), int)
    np.add.at(expected, (labels[counted], predicted[counted]), 1)
    found = logged(batch)
    assert {(a, b): count for a, b, count in found["confusion"]} == {
        place: expected[place] for place in np.ndindex(expected.shape) if expected[place]
    }
    wrong = np.flatnonzero(counted & (labels != predicted))
    surest = wrong[np.argsort(-probabilities[wrong].max(1))][:IMAGES]
    assert [value(record) for record in found["mistakes"]] == surest.tolist()
    assert [value(record) for record in found["examples"]] == [0, 8, 16, 24, 32]
    for record in [*found["examples"], *found["mistakes"]]:
        row = value(record)
        assert (record["label"], record["predicted"]) == (labels[row], predicted[row])
        assert record["probability"] == pytest.approx(probabilities[row].max(), abs=1e-4)


def test_no_images_and_too_many_classes() -> None:
    found = logged(8, images=0)
    assert (found["examples"], found["mistakes"]) == ([], [])
    assert sum(count for *_, count in found["confusion"]) == ROWS - 3
    log = PredictionLog(1, 2)
    many = Predictions(torch.zeros(2, MOST_CLASSES + 1), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=bool))
    log.add(torch.zeros(2, 1, 300, 200, dtype=torch.uint8), many, torch.ones(2))
    found = log.to_record(ALONE)
    assert found["confusion"] is None
    image = Image.open(io.BytesIO(base64.b64decode(found["examples"][0]["png"])))
    assert (image.size, image.mode) == ((64, 96), "L")
