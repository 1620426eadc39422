import pytest

from numbered_images import sample_numbers
from scalevit.data.loading.evaluation_loader import EvaluationLoader


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (50, 0), (2, 2)])
@pytest.mark.parametrize("batch", [7, 64])
def test_evaluation_counts_every_sample_once(numbered, world_size, workers, batch):
    dataset, seen, sizes = numbered[1], [], set()
    for rank in range(world_size):
        loader = EvaluationLoader(dataset, batch=batch, rank=rank, world_size=world_size, workers=workers)
        for _ in range(2):  # an evaluation again, by the same workers
            batches = list(loader)
            assert len(batches) == len(loader)
        for images, labels, weights, decoded, _, faults in batches:
            assert decoded.all()
            assert not faults
            real = weights == 1
            assert ((weights == 0) | real).all()
            assert (images[~real] == 0).all()
            assert (labels[~real] == 0).all()
            assert sample_numbers(images[real]) == labels[real].tolist()
            seen += labels[real].tolist()
            sizes.add((len(loader), len(weights)))
            assert len(images) == len(labels) == len(weights) <= batch
    assert sorted(seen) == list(range(45))
    assert len(sizes) == 1


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 0), (2, 1), (25, 0)])
def test_evaluation_shows_undecodable_images_as_such(damaged, world_size, workers):
    seen, keys, undecoded = [], [], []
    for rank in range(world_size):
        for batch in EvaluationLoader(damaged[1], batch=4, rank=rank, world_size=world_size, workers=workers):
            real = batch.weights == 1
            seen += batch.labels[real].tolist()
            undecoded += batch.labels[real & ~batch.decoded].tolist()
            assert (batch.images[~batch.decoded] == 0).all()
            assert batch.decoded[~real].all()
            keys += [fault.key for fault in batch.faults]
            assert sample_numbers(batch.images[real & batch.decoded]) == batch.labels[real & batch.decoded].tolist()
    assert sorted(seen) == list(range(20))
    assert sorted(undecoded) == [3, 8, 9]
    assert sorted(keys) == ["bad3", "bad8", "bad9"]
