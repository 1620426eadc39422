"""Shards behind fsspec: its memory file system, and a server of this process that fails, cuts and counts."""

import itertools
import re
import threading
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from scalevit.data.images import encode_png
from scalevit.data.loading import chunk_cache as cache_module
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.readers import CachedReader, LocalReader, RemoteReader
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.index import load_index
from scalevit.data.shards.verify import verify_shards
from scalevit.data.storage import remote
from scalevit.data.storage.paths import StreamOnlyError
from scalevit.data.transforms.base import ArrayTransform
from scalevit.data.writing.writer import write_samples
from scalevit.errors import SettingError, UserError

fsspec = pytest.importorskip("fsspec")

COUNT = 600


class Pixels(ArrayTransform):
    def __call__(self, pixels):
        import torch

        return torch.from_numpy(pixels[0, 0].copy())


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((4, 4), n % 256, np.uint8)), n) for n in range(COUNT)]
    write_samples(samples, folder, shard_size=250)
    return folder


@pytest.fixture
def bucket(local):
    """The same set in memory, and a count of what is read there."""
    filesystem = fsspec.filesystem("memory")
    name = f"/{uuid.uuid4().hex}"
    filesystem.mkdir(name)
    for path in local.iterdir():
        filesystem.pipe_file(f"{name}/{path.name}", path.read_bytes())
    yield f"memory:/{name}"
    filesystem.rm(name, recursive=True)


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)


def test_the_extra_of_a_missing_package_is_named(monkeypatch):
    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    remote._filesystem.cache_clear()
    with pytest.raises(UserError, match=r"s3://: .*Install s3fs.*; install the extra: pip install 'scalevit\[s3\]'"):
        remote.size_of("s3://bucket/0.tar")


def same(index, local):
    expected = load_index(local)
    assert index.fingerprint == expected.fingerprint
    assert index.crc32.tolist() == expected.crc32.tolist()
    return expected


def test_index_and_samples_of_a_bucket(bucket, local, tmp_path):
    index = load_index(bucket)
    expected = LocalReader(same(index, local))
    readers = RemoteReader(index), CachedReader(index, str(tmp_path))
    for sample in (0, 127, 128, 249, 250, 599):
        assert [reader.read(sample) for reader in readers] == [expected.read(sample)] * 2
    assert index.key(300) == "n300"
    assert [len(load_index(f"{bucket}/{pattern}")) for pattern in ("*.tar", "shard-{000000..000001}.tar")] == [600, 500]


def test_a_saved_index_that_was_copied_along_saves_the_walk(bucket, local, monkeypatch):
    load_index(local)
    filesystem = fsspec.filesystem("memory")
    (saved,) = local.glob(".index-*.npz")
    filesystem.pipe_file(f"{bucket}/{saved.name}", saved.read_bytes())
    monkeypatch.setattr("scalevit.data.shards.index.build_index", None)
    same(load_index(bucket), local)


def test_missing_and_damaged_in_a_bucket(bucket):
    filesystem = fsspec.filesystem("memory")
    path = f"{bucket}/shard-000001.tar"
    content = filesystem.cat_file(path)
    filesystem.pipe_file(path, content[:100_000])
    with pytest.raises(UserError, match=re.escape(f"shard {path}, offset ") + r"\d+: truncated"):
        load_index(bucket)
    reports = list(verify_shards([f"{bucket}/shard-{n:06d}.tar" for n in range(3)]))
    assert [bool(report.faults) for report in reports] == [False, True, False]
    filesystem.rm(path)
    with pytest.raises(UserError, match=r"1 of 3 are missing, first shard-000001"):
        load_index(bucket)
    with pytest.raises(UserError, match=r"shard-000001\.tar: no such file"):
        load_index(f"{bucket}/shard-{{000000..000002}}.tar")
    with pytest.raises(UserError, match="no shards at memory://nowhere"):
        load_index("memory://nowhere")


def test_each_chunk_is_fetched_once_and_the_limit_kept(bucket, local, tmp_path, monkeypatch):
    index = load_index(bucket)
    fetched = Counter()
    read_range = remote.read_range
    monkeypatch.setattr(remote, "read_range", lambda *place: (fetched.update([place]), read_range(*place))[1])
    reader, other = CachedReader(index, str(tmp_path)), CachedReader(index, str(tmp_path))
    for sample in range(COUNT):
        (reader, other)[sample % 2].read(sample)
    chunks = len({(sample // 128, index.shard[sample]) for sample in range(COUNT)})
    assert chunks == 7
    assert sorted(fetched.values()) == [1] * chunks
    # Under a limit of two chunks, those that were used longest ago go.
    size = max(end - start for _, start, end in fetched)
    tight = CachedReader(index, str(tmp_path / "tight"), limit=2 * size)
    expected = LocalReader(load_index(local))
    for sample in [*range(COUNT), 0]:
        assert tight.read(sample) == expected.read(sample)
        assert sum(path.stat().st_size for path in (tmp_path / "tight").glob("*/*")) <= 2 * size
    assert fetched[next(iter(fetched))] == 3


def test_announced_chunks_are_fetched_in_the_background(bucket, tmp_path, monkeypatch):
    index = load_index(bucket)
    reader = CachedReader(index, str(tmp_path))
    reader.prefetch(np.arange(0, 300))
    for future in list(reader._cache._fetching.values()):
        future.result(10)
    monkeypatch.setattr(remote, "read_range", None)
    reader.read(0), reader.read(255)
    reader.prefetch(np.arange(0, 250))  # all are in the folder


def test_training_from_a_bucket_is_training_from_a_disk(bucket, local, tmp_path):
    index = load_index(bucket)
    batches = {}
    for name, dataset in (
        ("disk", ShardDataset(load_index(local), Pixels())),
        ("bucket", ShardDataset(index, Pixels(), reader=CachedReader(index, str(tmp_path), 100_000))),
    ):
        loader = TrainLoader(dataset, Order(COUNT, 0), global_batch=20, micro_batch=10)
        batches[name] = [batch.labels.tolist() for batch in itertools.islice(loader.batches(3), 70)]
        assert not any(batch.faults for batch in itertools.islice(loader.batches(0), 4))
    assert batches["bucket"] == batches["disk"]


def test_retries_with_growing_delays(bucket, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    failures = iter([OSError("reset"), TimeoutError(), ConnectionError("gone")])

    def unreliable():
        for failure in failures:
            raise failure
        return 7

    assert remote.with_retries(unreliable, "x://y") == 7
    assert len(waits) == 3
    for number, wait in enumerate(waits):
        assert 0.75 <= wait / (remote.FIRST_DELAY_SECONDS * 2**number) <= 1.25

    def broken():
        raise OSError("the wire\nis cut")

    with pytest.raises(UserError, match=r"^x://y: cannot be read, tried 5 times \(the wire is cut\)$"):
        remote.with_retries(broken, "x://y")


def test_a_cache_that_cannot_be_written(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    index = load_index(bucket)
    with pytest.raises(SettingError, match=r"^cache = .*file\": cannot be written"):
        CachedReader(index, str(tmp_path / "file"))

    def full(self, content):
        raise OSError(28, "No space left on device")

    reader = CachedReader(index, str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module.Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"^chunk cache .*cannot be written \(No space left on device\)"):
        reader.read(0)


def test_unknown_protocol():
    with pytest.raises(UserError, match="nosuch://: cannot be read") as caught:
        load_index("nosuch://bucket/set")
    assert "\n" not in str(caught.value)


# --- http -------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Files of a folder; `fail` answers that many requests with an error, `ranges` off ignores ranges."""

    fail, ranges, cut = 0, True, 0

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests = folder, Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        path = server.folder / self.path.lstrip("/")
        server.requests[self.path] += 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if server.fail and asked:
            server.fail -= 1
            return self.reply(503, b"", body)
        if not path.is_file():
            return self.reply(404, b"", body)
        content = path.read_bytes()
        if not asked or not server.ranges:
            return self.reply(200, content, body)
        first, last = int(asked[1]), int(asked[2])
        part = content[first : last + 1]
        if server.cut:
            server.cut -= 1
            part = part[:-100]
        return self.reply(206, part, body, f"bytes {first}-{last}/{len(content)}")

    def reply(self, status, content, body, place=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if place:
            self.send_header("Content-Range", place)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def server(local):
    pytest.importorskip("aiohttp")
    server = Server(local)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("pattern", ["", "/shard-{000000..000002}.tar"])
def test_http_by_ranges(server, local, tmp_path, pattern):
    index = load_index(server.address + pattern)
    expected = LocalReader(same(index, local))
    before = sum(server.requests.values())
    reader = CachedReader(index, str(tmp_path))
    assert [reader.read(n) for n in range(COUNT)] == [expected.read(n) for n in range(COUNT)]
    assert sum(server.requests.values()) - before == 7


def test_http_that_fails_and_cuts_for_a_while(server, local, tmp_path, no_waiting):
    index = load_index(server.address)
    reader = CachedReader(index, str(tmp_path))
    server.fail, server.cut = 2, 2
    assert reader.read(5) == LocalReader(load_index(local)).read(5)
    assert (server.fail, server.cut) == (0, 0)
    server.fail = 1000
    with pytest.raises(UserError, match=r"shard-000002\.tar: cannot be read, tried 5 times"):
        reader.read(599)
    assert not list(tmp_path.glob("*/*.tmp"))


def test_http_without_ranges_is_reported(server, tmp_path):
    """Found when a part is asked for; these shards are small enough to be walked by one request."""
    server.ranges = False
    reader = CachedReader(load_index(server.address), str(tmp_path))
    with pytest.raises(StreamOnlyError, match=r"shard .*\.tar: the server does not support byte ranges"):
        reader.read(5)
