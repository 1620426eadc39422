"""Losses against timm's, bit for bit where timm computes the same, and targets against timm's mixing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from scalevit.config.loading import load_config
from scalevit.data.transforms.mixing import MixedLabels
from scalevit.training.losses import LOSSES
from scalevit.training.losses.base import Loss, soft_targets
from scalevit.training.losses.bce import BinaryCrossEntropyLoss
from scalevit.training.losses.cross_entropy import CrossEntropyLoss
from scalevit.training.losses.jsd import JsdLoss

CLASSES = 10
WEIGHTS = [1.0, 0.0, 0.5, float(np.float64(0.8167203947561932))]


def batch(weight: float) -> tuple[Tensor, MixedLabels]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(16, CLASSES, generator=generator, requires_grad=True)
    labels = torch.randint(0, CLASSES, (16,), generator=generator)
    return logits, MixedLabels(labels, labels.flip(0), torch.full((len(labels),), weight, dtype=torch.float64))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_and_cross_entropy_are_timms_bit_for_bit(weight: float, smoothing: float) -> None:
    logits, labels = batch(weight)
    targets = mixup_target(labels.labels, CLASSES, weight, smoothing)
    assert torch.equal(soft_targets(labels, CLASSES, smoothing), targets)
    loss = CrossEntropyLoss(label_smoothing=smoothing)
    ours, theirs = loss(logits, labels), F.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(value.sum(), logits)[0] for value in (ours, theirs)))
    torch.testing.assert_close(ours.mean(), SoftTargetCrossEntropy()(logits, targets))


def test_unmixed_cross_entropy_is_timms_label_smoothing() -> None:
    logits, labels = batch(1.0)
    theirs = LabelSmoothingCrossEntropy(0.1)(logits, labels.labels)
    torch.testing.assert_close(CrossEntropyLoss(label_smoothing=0.1)(logits, labels).mean(), theirs)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize(("sums", "positive"), [(False, None), (True, None), (False, 3.0), (True, 0.5)])
def test_binary_cross_entropy_is_timms(
    weight: float, threshold: float | None, sums: bool, positive: float | None
) -> None:
    logits, labels = batch(weight)
    criterion = BinaryCrossEntropy(target_threshold=threshold, sum_classes=sums, pos_weight=positive)
    theirs = criterion(logits, mixup_target(labels.labels, CLASSES, weight, 0.1))
    loss = BinaryCrossEntropyLoss(
        label_smoothing=0.1, target_threshold=threshold, sum_classes=sums, positive_weight=positive
    )
    torch.testing.assert_close(loss(logits, labels).mean(), theirs)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_divergence_of_views_is_timms(views: int, smoothing: float) -> None:
    """With its gradient; a row of weight 0 is left out."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4 * views, CLASSES, generator=generator, requires_grad=True)
    labels = torch.randint(CLASSES, (4,), generator=generator).repeat(views)
    loss = JsdLoss(label_smoothing=smoothing)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(views) / views
    mixed = MixedLabels(labels, labels, torch.ones(len(labels), dtype=torch.float64), views)
    ours = loss.weighted_sum(logits, mixed, weights) / 3
    kept = logits.unflatten(0, (views, 4))[:, :3].flatten(0, 1)
    theirs = JsdCrossEntropy(num_splits=views, smoothing=smoothing)(kept, labels.view(views, 4)[:, :3].flatten())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, theirs)))


def test_the_divergence_needs_views() -> None:
    JsdLoss().check_views(2)
    for views in (0, 1):
        with pytest.raises(ValueError, match=f"data.augmentation.splits = {views} must be at least 2"):
            JsdLoss().check_views(views)


def test_with_a_threshold_a_mixed_image_has_two_whole_labels() -> None:
    labels = MixedLabels(torch.tensor([1]), torch.tensor([3]), torch.tensor([0.7]))
    logits = torch.tensor([[-20.0, 20.0, -20.0, 20.0, -20.0]])
    loss = BinaryCrossEntropyLoss(label_smoothing=0.0, target_threshold=0.2)
    assert loss(logits, labels).item() < 1e-6
    assert BinaryCrossEntropyLoss(label_smoothing=0.0)(logits, labels).item() > 1


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind())
def test_every_loss_is_one_number_per_image_and_can_be_configured(loss: type[Loss]) -> None:
    logits, labels = batch(0.3)
    values = loss()(logits, labels)
    assert values.shape == (16,)
    weights = torch.arange(len(values), dtype=torch.float32)
    torch.testing.assert_close(loss().weighted_sum(logits, labels, weights), (values * weights).sum())
    views = ["data.augmentation.splits=2", "data.augmentation.mixup=0", "data.augmentation.cutmix=0"]
    assert type(load_config(None, [f"loss.name={loss.kind()}", *views]).loss) is loss
