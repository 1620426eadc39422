"""What `BatchBuffers` relies on in torch's DataLoader; a failure says what a new version of torch has changed."""

import inspect
import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from scalevit.data.loading.base import Batch, data_loader, iterate_batches
from scalevit.data.loading.shared_buffers import PREFETCHED, BatchBuffers


class WhoMakesWhat(Dataset):
    """A batch of one image; its row is the number of the worker that made it."""

    def __init__(self, buffers):
        self.buffers = buffers

    def __getitem__(self, request):
        worker = get_worker_info()
        images = self.buffers([torch.full((3, 1, 1), float(request))])
        rows = torch.tensor([worker.id if worker else 0])
        return Batch(images, torch.tensor([request]), request, rows, ())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_come_in_order_from_workers_in_turn_with_a_fixed_number_requested(workers):
    requested = itertools.count()
    buffers = BatchBuffers(held=1, workers=workers)
    batches = iterate_batches(data_loader(WhoMakesWhat(buffers), requested, workers, False, keep_workers=False))
    for number in range(20):
        batch = next(batches)
        assert batch.step == number, "torch's DataLoader returns batches in another order"
        assert batch.rows.tolist() == [number % workers], "torch's DataLoader does not give requests to workers in turn"
        next_request = int(repr(requested)[len("count(") : -1])
        assert next_request == number + 1 + PREFETCHED * workers, (
            f"torch's DataLoader has requested {next_request} batches when it returns number {number}, "
            f"where BatchBuffers relies on {PREFETCHED} per worker beyond those returned"
        )
        assert batch.images.flatten().tolist() == [number] * 3
        assert batch.labels.tolist() == [number]


def test_order_is_the_default_of_the_data_loader():
    """`data_loader` does not set it, because older versions lack the argument."""
    in_order = inspect.signature(DataLoader.__init__).parameters.get("in_order")
    assert in_order is None or in_order.default is True, "torch's DataLoader no longer returns batches in order"


def test_a_worker_has_as_many_buffers_as_may_be_in_use():
    assert [BatchBuffers(held, workers).buffers - PREFETCHED for held, workers in ((1, 0), (1, 4), (4, 1), (5, 2))] == [
        1,
        1,
        4,
        3,
    ]
