"""Metrics of predictions, and what an evaluation is called in records."""

import torch

from scalevit.runs.summary import best_epoch
from scalevit.training.evaluation import Evaluation
from scalevit.training.metrics import METRICS, Predictions


def test_top_k_counts_a_label_among_the_first_k_and_no_image_that_cannot_be_decoded() -> None:
    logits = torch.arange(6.0).repeat(4, 1)  # class 5 first, class 0 last
    labels = torch.tensor([5, 1, 0, 5])
    predictions = Predictions(logits, labels, torch.tensor([True, True, True, False]))
    values = {name: metric.of_images(predictions) for name, metric in METRICS.items()}
    assert values["top1"].tolist() == [True, False, False, False]
    assert values["top5"].tolist() == [True, True, False, False]
    torch.testing.assert_close(values["loss"], -logits.log_softmax(1)[torch.arange(4), labels])


def test_with_fewer_than_five_classes_top_5_counts_all() -> None:
    predictions = Predictions(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2]), torch.tensor([True]))
    assert METRICS["top5"].of_images(predictions).tolist() == [True]


def test_the_emas_top_1_is_the_score_and_records_keep_their_keys() -> None:
    own = {"top1": 50.0, "top5": 80.0, "loss": 1.5}
    both = Evaluation({"weights": own, "ema": {"top1": 40.0, "top5": 70.0, "loss": 2.0}})
    assert (Evaluation({"weights": own}).score("top1"), both.score("top1")) == (50.0, 40.0)
    assert both.score("loss") == -2.0
    assert both.to_record() == {**own, "ema_top1": 40.0, "ema_top5": 70.0, "ema_loss": 2.0}
    assert str(both) == "weights top-1 50.00 %, top-5 80.00 %; EMA top-1 40.00 %, top-5 70.00 %"
    record = {"epoch": 1, **both.to_record()}
    assert best_epoch([record], "ema", "top1") is record
