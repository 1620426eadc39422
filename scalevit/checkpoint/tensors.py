"""Pieces to and from safetensors files, by torch.distributed.checkpoint with planners that know our pieces.

torch's own metadata file is a pickle, which can run code when it is read. Its safetensors storage has none: each file's
header says which range of which (flattened) tensor it holds. So files can be read by torch's HuggingFaceStorageReader
and by safetensors alone.
"""

import io
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from scalevit.engines.state import Piece
from scalevit.errors import UserError


def write_pieces(folder: Path, pieces: Mapping[str, Piece], *, rank: int) -> None:
    """Writes this rank's file, `file_of(rank)`. Not collective: ranks have nothing to agree on.

    Args:
        pieces: by tensor name, on the CPU; those of all ranks together are each tensor once.

    Raises:
        UserError: the file cannot be written.
    """
    held = {name: piece for name, piece in pieces.items() if piece.values.numel()}
    writer = _Writer(str(folder), rank)
    with _one_line(f"checkpoint {folder}: cannot be written"), _quiet_alone():
        dcp.save(held, storage_writer=writer, planner=_Saving(), no_dist=True)


def file_of(rank: int) -> str:
    """The name that torch's writer gives it."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def read_pieces(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fills pieces of any cut from the files of a folder. Not collective: each rank reads what it needs.

    Raises:
        UserError: a file cannot be read, or the files do not hold all of a piece.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with _one_line(f"checkpoint {folder}: cannot be read"), _quiet_alone():
        dcp.load(dict(pieces), storage_reader=reader, planner=_Loading(), no_dist=True)


class _Writer(HuggingFaceStorageWriter):
    """Names the file by the rank. torch would gather all ranks' plans on one, which takes minutes with many ranks."""

    def __init__(self, path: str, rank: int):
        super().__init__(path, save_distributed=True)
        self._shard_index = rank + 1

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data={"shard_index": self._shard_index}) for plan in plans]


class _one_line:
    """What torch raises, as a `UserError` where it is the files' fault."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CheckpointException):
            reasons = [reason for reason, _ in error.failures.values()]
            if all(isinstance(reason, OSError | SafetensorError | UserError) for reason in reasons):
                raise UserError(f"{self._what} ({' '.join(str(reasons[0]).split())})") from None


class _quiet_alone(warnings.catch_warnings):
    """torch warns when there is one process, which is what we asked for."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([piece.start]), torch.Size([piece.values.numel()]))


class _Saving(SavePlanner):
    """Writes the pieces as they are."""

    def set_up_planner(
        self, state_dict: dict[str, Piece], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self._pieces = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(name, piece) for name, piece in self._pieces.items()])

    @staticmethod
    def _item(name: str, piece: Piece) -> WriteItem:
        chunk = _chunk(piece)
        data = TensorWriteData(
            chunk, TensorProperties.create_from_tensor(piece.values), torch.Size([piece.shape.numel()])
        )
        return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})  # the files' headers say it all

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._pieces[write_item.index.fqn].values


class _Loading(LoadPlanner):
    """Reads what the pieces have in common with the files'."""

    def set_up_planner(
        self, state_dict: dict[str, Piece], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._pieces, self._metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, piece in self._pieces.items():
            found = self._metadata.state_dict_metadata.get(name)
            reads = (
                create_read_items_for_chunk_list(name, found, [_chunk(piece)])
                if isinstance(found, TensorStorageMetadata)
                else []
            )
            if sum(read.lengths.numel() for read in reads) != piece.values.numel():
                raise UserError(f"{name} is not whole")
            items += reads
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("checkpoints hold tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        values = self._pieces[read_item.dest_index.fqn].values
        return values.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
