import gzip
import io
import itertools
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from scalevit.data.images import encode_png
from scalevit.data.loading.stream_loader import StreamLoader
from scalevit.data.order.batching import PADDING
from scalevit.data.transforms.base import ArrayTransform
from scalevit.data.writing.writer import write_samples
from scalevit.errors import SettingError, UserError


class Grey(ArrayTransform):
    def __call__(self, pixels):
        return torch.from_numpy(pixels[0, 0].copy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((2, 2), n, np.uint8)), n) for n in range(40)]
    samples[7] = ("bad7", "jpg", b"no image", 7)
    write_samples(samples, folder, shard_size=10)
    return folder


def stream(folder, **settings):
    settings = {"samples": 40, "num_classes": 40, "global_batch": 6, "micro_batch": 3, **settings}
    return StreamLoader(f"pipe:cat {folder}/shard-{{000000..000003}}.tar", Grey(), **settings)


def load(loader, start, steps):
    """Batches of some steps, each with the rows that `Split` says and images that show their labels."""
    expected = [each for step in range(start, start + steps) for each in loader.split.of_rank(loader.rank, step)]
    for batch, (step, rows) in zip(itertools.islice(loader.batches(start), len(expected)), expected, strict=True):
        assert (batch.step, batch.rows.tolist()) == (step, rows.tolist())
        assert len(batch.labels) == loader.split.loaded_rows
        assert batch.images[:, 0].tolist() == batch.labels.tolist()
        yield batch


def shown(batch):
    """Labels of the rows that are no padding."""
    return batch.labels[batch.rows != PADDING].tolist()


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch"), [(1, 0, 3), (1, 1, 64), (2, 0, 3), (2, 2, 2), (2, 1, 4), (3, 0, 1)]
)
def test_pipes_are_streamed_with_bad_samples_listed(folder, world_size, workers, micro_batch):
    """Rows are split as those of `TrainLoader`: two ranks have two and four, so the first fills up with padding."""
    seen, bad, rows = Counter(), set(), []
    for rank in range(world_size):
        loader = stream(folder, rank=rank, world_size=world_size, workers=workers, micro_batch=micro_batch)
        for batch in load(loader, 5, 26):
            seen.update(shown(batch))
            rows += [(batch.step, row) for row in batch.rows.tolist() if row != PADDING]
            bad |= {(fault.key, fault.reason) for fault in batch.faults}
    assert sorted(rows) == list(itertools.product(range(5, 31), range(6)))
    assert set(seen) == set(range(40)) - {7}
    assert bad == {("bad7", "unknown image format")}
    assert stream(folder).epoch_end_step(0) == stream(folder).steps_in(1) == 7


@pytest.mark.parametrize(
    ("world_size", "rank", "workers"), [(2, 0, 0), (2, 0, 1), (2, 0, 2), (2, 1, 2), (4, 0, 0), (4, 0, 1), (4, 1, 1)]
)
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_padding_is_black_and_uses_up_no_samples(folder, world_size, rank, workers, micro_batch):
    """Also where some batches are nothing but padding, and for the first of four ranks, which has no others. The
    samples of each worker, of one shard or two, are shown equally often.
    """
    loader, seen = stream(folder, rank=rank, world_size=world_size, workers=workers, micro_batch=micro_batch), Counter()
    for batch in load(loader, 0, 20):
        padding = batch.rows == PADDING
        assert not batch.images[padding].any()
        assert not batch.labels[padding].any()
        seen.update(shown(batch))
    shards = range(rank, 4, world_size)
    parts = [shards[worker :: max(1, workers)] for worker in range(max(1, workers))]
    for part in parts:
        times = [seen.pop(n, 0) for n in range(40) if n // 10 in part and n != 7]
        assert max(times) - min(times) <= 1
        assert min(times) > 0 or (world_size, rank) == (4, 0)
    assert not seen


def test_two_iterators_do_not_share_memory(folder):
    """Of one loader, in turns; each has workers of its own."""
    loader = stream(folder, workers=1)
    alone = [batch.labels.tolist() for batch in itertools.islice(loader.batches(5), 8)]
    one, other = loader.batches(5), loader.batches(5)
    for expected in alone:
        for batch in (next(one), next(other)):
            assert batch.images[:, 0].tolist() == batch.labels.tolist() == expected


def test_it_says_that_it_cannot_be_resumed_exactly(folder):
    assert "not exactly resumable" in stream(folder).fingerprint.values()
    first, second = (next(stream(folder).batches(start)).labels.tolist() for start in (0, 1))
    assert first != second
    assert next(stream(folder).batches(0)).labels.tolist() == first


def cut_at_a_border(content):
    """After the first sample's label: to tarfile and webdataset a whole tar of one sample."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return content[: tar.getmembers()[2].offset]


def without_a_header(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        place = tar.getmembers()[4].offset
    return content[:place] + bytes(512) + content[place + 512 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_at_a_border, "no end-of-archive mark"),
        (without_a_header, "data after the end mark, or a lost header"),
        (lambda content: content[:700], "truncated"),
        (lambda content: content[:-1024].rstrip(b"\0") + bytes(512), "truncated|half an end"),
        (lambda content: b"garbage" * 1000, "no tar header here"),
        (lambda content: b"", "no end-of-archive mark"),
        (gzip.compress, "compressed"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_streams_end_in_one_line(folder, tmp_path, damage, message, workers):
    (tmp_path / "a.tar").write_bytes(damage((folder / "shard-000000.tar").read_bytes()))
    pattern, sizes = f"pipe:cat {tmp_path}/a.tar", {"global_batch": 1, "micro_batch": 1}
    loader = StreamLoader(pattern, Grey(), samples=10, num_classes=40, workers=workers, **sizes)
    with pytest.raises(UserError, match=rf"^stream of pipe:.*a\.tar: broken \(offset \d+: .*({message})") as caught:
        list(itertools.islice(loader.batches(0), 100))
    assert "\n" not in str(caught.value)


def test_a_command_that_fails_ends_in_one_line(tmp_path):
    loader = StreamLoader(
        f"pipe:cat {tmp_path}/nothing.tar", Grey(), samples=10, num_classes=9, global_batch=1, micro_batch=1
    )
    with pytest.raises(UserError, match="broken") as caught:
        next(loader.batches(0))
    assert "\n" not in str(caught.value)


def test_links_are_refused_and_listed(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar, tarfile.open(folder / "shard-000000.tar") as whole:
        for number, member in enumerate(whole.getmembers()):
            if number == 4:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(member, whole.extractfile(member) if member.isreg() else None)
    loader = StreamLoader(
        f"pipe:cat {tmp_path}/a.tar", Grey(), samples=10, num_classes=40, global_batch=1, micro_batch=1
    )
    faults = [fault for batch in itertools.islice(loader.batches(0), 15) for fault in batch.faults]
    assert any("is a link" in fault.reason for fault in faults)


def test_too_few_shards(folder):
    with pytest.raises(SettingError, match=r"^workers = 3: .* names 4 shards, and each worker of 2 ranks needs one"):
        stream(folder, world_size=2, workers=3)
