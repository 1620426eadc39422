"""What a program (torch, ONNX) carries beside its operations: how images are prepared, and names of its outputs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scalevit.export.base import Exported, ModelDescription, Preprocessing

if TYPE_CHECKING:
    from scalevit.export.base import Logits

METADATA_KEY = "scalevit"
"""Under which an ONNX file has the record, as JSON."""
EXTRA_FILE = "scalevit.json"
"""In which a torch program has it."""


def record_of(description: ModelDescription) -> dict[str, Any]:
    """The record as plain values."""
    return {
        "model": description.model.name,
        "reduction": description.reduction.model_dump(mode="json"),
        "num_classes": description.model.num_classes,
        "classes": description.label_names,
        "preprocessing": description.preprocessing.to_json(),
    }


def exported_of_record(logits: "Logits", record: Mapping[str, Any]) -> Exported:
    """A program with what its record says.

    Raises:
        KeyError, TypeError, ValueError: the record is not one of `record_of`.
    """
    names = record["classes"]
    classes = None if names is None else [str(name) for name in names]
    return Exported(logits, Preprocessing.from_json(record["preprocessing"]), int(record["num_classes"]), classes)
