"""Checkpoints: one form for every engine and world size, written by all ranks beside the training, without pickle."""

from scalevit.checkpoint.folder import list_checkpoints, read_record
from scalevit.checkpoint.restoring import newest_whole, restore
from scalevit.checkpoint.saver import Saver
from scalevit.checkpoint.state import RunState

__all__ = ["RunState", "Saver", "list_checkpoints", "newest_whole", "read_record", "restore"]
