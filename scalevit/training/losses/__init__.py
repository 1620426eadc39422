"""Training losses, one file each. A new one is its file and one line here."""

from scalevit.training.losses.bce import BinaryCrossEntropyLoss
from scalevit.training.losses.cross_entropy import CrossEntropyLoss
from scalevit.training.losses.jsd import JsdLoss

LOSSES = (CrossEntropyLoss, BinaryCrossEntropyLoss, JsdLoss)
