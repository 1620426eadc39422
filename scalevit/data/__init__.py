"""Shards in, batches out: knows files, bytes, tensors, and rank and world size as two integers.

Must not know models, engines, torch.distributed or configs. The public names are imported when first used, so that
writing shards imports no torch and a loader's workers import no more than they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalevit.data.batches import Batching, MicroBatch, spread_rank
    from scalevit.data.dataset import ShardDataset
    from scalevit.data.embedded import ensure_digits
    from scalevit.data.faults import Fault, FaultLog
    from scalevit.data.index import Index, load_index
    from scalevit.data.loader import Batch, EvaluationBatch, EvaluationLoader, TrainLoader, check_fingerprint
    from scalevit.data.locations import find_shards
    from scalevit.data.order import Order
    from scalevit.data.reading import open_reader
    from scalevit.data.shards import write_image_folder, write_samples
    from scalevit.data.streaming import StreamLoader
    from scalevit.data.transforms import Mix, evaluation_transform, training_transform
    from scalevit.data.transforms_fast import FastEvaluation, FastTraining, Finish

_PUBLIC = {
    "batches": ("Batching", "MicroBatch", "spread_rank"),
    "dataset": ("ShardDataset",),
    "embedded": ("ensure_digits",),
    "faults": ("Fault", "FaultLog"),
    "index": ("Index", "load_index"),
    "loader": ("Batch", "EvaluationBatch", "EvaluationLoader", "TrainLoader", "check_fingerprint"),
    "locations": ("find_shards",),
    "order": ("Order",),
    "reading": ("open_reader",),
    "shards": ("write_image_folder", "write_samples"),
    "streaming": ("StreamLoader",),
    "transforms": ("Mix", "evaluation_transform", "training_transform"),
    "transforms_fast": ("FastEvaluation", "FastTraining", "Finish"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "Batch",
    "Batching",
    "EvaluationBatch",
    "EvaluationLoader",
    "FastEvaluation",
    "FastTraining",
    "Fault",
    "FaultLog",
    "Finish",
    "Index",
    "MicroBatch",
    "Mix",
    "Order",
    "ShardDataset",
    "StreamLoader",
    "TrainLoader",
    "check_fingerprint",
    "ensure_digits",
    "evaluation_transform",
    "find_shards",
    "load_index",
    "open_reader",
    "spread_rank",
    "training_transform",
    "write_image_folder",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
