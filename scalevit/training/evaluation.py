"""Top-1 and top-5 over a validation set that is split over ranks, every sample exactly once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scalevit.data.faults import Fault
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.engines.base import Engine


@dataclass(frozen=True)
class Accuracy:
    """Percentages over the whole set, and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float


@torch.no_grad()
def evaluate(
    engine: Engine, loader: EvaluationLoader, *, channels_last: bool = False, faults: list[Fault] | None = None
) -> Accuracy:
    """Evaluates the engine's present weights.

    Rows that pad the last batches carry weight 0; an image that cannot be decoded counts as wrong, with the loss of
    a blank one. With fewer than five classes, top-5 counts as top-all.

    Args:
        engine: holds the weights.
        loader: of this rank.
        channels_last: memory format.
        faults: takes this rank's bad samples.
    """
    engine.eval()
    device = engine.world.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # weight, top-1, top-5, loss
    batches = iter(loader)
    for _ in range(len(loader)):
        with engine.world.agreeing_on_errors():
            batch = next(batches)
        if faults is not None:
            faults += batch.faults
        images = loader.finish(batch.images.to(device, non_blocking=True).contiguous(memory_format=layout))
        labels = batch.labels.to(device, non_blocking=True)
        weights = batch.weights.to(device, torch.float64)
        logits = engine(images).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (ranked == labels[:, None]) & batch.decoded.to(device)[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none")
        rows = torch.stack([torch.ones_like(loss), hits[:, 0], hits.any(1), loss]).double()
        totals += (rows * weights).sum(1)
    engine.train()
    count, top1, top5, loss_sum = engine.world.all_reduce_sum(totals).tolist()
    assert count == len(loader.dataset), f"evaluated {count:g} of {len(loader.dataset)} samples"
    return Accuracy(100 * top1 / count, 100 * top5 / count, loss_sum / count)
