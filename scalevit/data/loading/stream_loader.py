"""Training batches from a stream: pipes, and servers without byte ranges. Not exactly resumable.

webdataset's pipeline reads whole shards from their beginning, so a run cannot be resumed inside a shard: a resumed run
starts its shards again with another seed, and will show some samples again and others later. The order depends on the
number of ranks and workers. Use it only for shards that cannot be read at any offset. Bad samples are skipped, because
no other sample is available, but they are listed and counted like all others. Must not know models, engines or process
groups.
"""

import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from scalevit.data.faults import Fault
from scalevit.data.images import KINDS, UndecodableImage
from scalevit.data.loading.base import Batch, Fingerprint, OnDevice, TrainingBatches, data_loader, iterate_batches
from scalevit.data.loading.dataset import blank, decoder_for, images_of
from scalevit.data.loading.shared_buffers import BatchBuffers
from scalevit.data.order.batching import PADDING, BatchLayout
from scalevit.data.shards import tar
from scalevit.data.shards.labels import EXTENSIONS, INTEGERS, LabelFormat, NoLabel
from scalevit.data.storage.files import ForwardFile
from scalevit.data.storage.paths import expand_braces
from scalevit.data.transforms.base import Transform
from scalevit.errors import SettingError, UserError
from scalevit.randomness import hash64, seed_sample

_SHUFFLED = 1000


class StreamLoader(TrainingBatches):
    """Training batches as `TrainLoader` makes them, but from a stream.

    Args:
        pattern: addresses or `pipe:` commands with braces; at least one shard for each worker of each rank.
        transform: as for `ShardDataset`.
        samples: in an epoch; a stream does not contain this number.
        num_classes: labels must be below it.
        seed: of the order and the augmentation.
        labels: how they are written.
        exif_orientation: as for `ShardDataset`.
        global_batch, micro_batch, rank, world_size, workers, pin_memory, finish: as for `TrainLoader`.

    Raises:
        SettingError: `workers`: there are fewer shards; `global_batch` is less than the number of ranks.
        UserError: the braces of the pattern do not match.
    """

    def __init__(
        self,
        pattern: str,
        transform: Transform,
        *,
        samples: int,
        num_classes: int,
        global_batch: int,
        micro_batch: int,
        seed: int = 0,
        labels: LabelFormat = INTEGERS,
        exif_orientation: bool = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        finish: OnDevice | None = None,
    ) -> None:
        super().__init__(
            BatchLayout(global_batch),
            micro_batch=micro_batch,
            samples=samples,
            rank=rank,
            world_size=world_size,
            workers=workers,
            pin_memory=pin_memory,
            finish=finish,
        )
        self.seed = seed
        urls = expand_braces(pattern)
        if len(urls) < world_size * max(1, workers):
            reason = f"{pattern} names {len(urls)} shards, and each worker of {world_size} ranks needs one of its own"
            raise SettingError("workers", workers, reason)
        decoder = decoder_for(transform, exif_orientation=exif_orientation)
        self._stream = _Stream(urls[rank::world_size], transform, decoder, seed, rank, labels, num_classes)

    @property
    def index_faults(self) -> Sequence[Fault]:
        """None: bad samples of a stream are found while it is read."""
        return ()

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of labels 0..., where they were given."""
        return self._stream.labels.names

    @property
    def fingerprint(self) -> Fingerprint:
        """States that a stream cannot be resumed exactly."""
        return {"streaming": "not exactly resumable", "samples": self.samples, "seed": self.seed}

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Endless batches, whose images are overwritten as those of `TrainLoader`. `start_step` is the number of the
        first step and changes the seed, but no samples are skipped.

        Raises:
            UserError: while iterating: a shard cannot be streamed.
        """
        stream = copy(self._stream)
        counts = [int((load.rows != PADDING).sum()) for load in self.split.of_rank(self.rank, start_step)]
        stream.start_step, stream.rows = start_step, self.split.loaded_rows
        # Batches of padding only are not asked for: a worker that always had their turn would show none of its shards.
        stream.counts = [count for count in counts if count]
        stream.buffers = BatchBuffers(held=self.split.loads, workers=self._workers)
        parts = iterate_batches(data_loader(stream, None, self._workers, self._pin_memory, keep_workers=False))
        padding = None if all(counts) else stream.padding()
        for step in itertools.count(start_step):
            for load, count in zip(self.split.of_rank(self.rank, step), counts, strict=True):
                batch = next(parts) if count else padding
                assert batch is not None
                yield batch._replace(step=step, rows=torch.from_numpy(load.rows))


class _Stream(IterableDataset[Any]):
    """Endless batches of one worker."""

    def __init__(
        self,
        urls: list[str],
        transform: Transform,
        decoder: Callable[[bytes], Any],
        seed: int,
        rank: int,
        labels: LabelFormat,
        num_classes: int,
    ) -> None:
        self.urls, self.transform, self.seed, self.rank = urls, transform, seed, rank
        self.labels, self.num_classes = labels, num_classes
        self.start_step = 0
        self.rows = 1
        """Of each batch."""
        self.counts = [1]
        """Rows that are no padding, of the batches in turn."""
        self.buffers = BatchBuffers(held=1, workers=0)
        self._decode = decoder
        self._faults: list[Fault] = []

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self._batches()
        except UserError as error:
            while True:  # if a worker ended, the others would take its turns, see `BatchBuffers`
                yield error

    def _batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        counts = (self.counts[batch % len(self.counts)] for batch in itertools.count(number, count))
        wanted = next(counts)
        tensors: list[torch.Tensor] = []
        batch_labels: list[int] = []
        for position, sample in enumerate(self._samples(self.urls[number::count], number)):
            read = self._read(sample)
            if isinstance(read, Fault):
                self._faults.append(read)
                continue
            image, label = read
            # Different for every rank, worker and restart, so that no two samples have the same random draws.
            seed_sample(hash64(self.seed, self.rank, number, self.start_step), position, 0)
            tensors.append(self.transform(image))
            batch_labels.append(label)
            if len(tensors) == wanted:
                faults, self._faults = self._faults, []
                tensors += [torch.zeros_like(tensors[0])] * (self.rows - wanted)
                batch_labels += [0] * (self.rows - wanted)
                yield Batch(self.buffers(images_of(tensors)), torch.tensor(batch_labels), 0, torch.empty(0), faults)
                tensors, batch_labels, wanted = [], [], next(counts)

    def padding(self) -> Batch:
        """A batch of nothing else."""
        images = self.buffers(images_of([blank(self.transform)] * self.rows))
        return Batch(images, torch.zeros(self.rows, dtype=torch.int64), 0, torch.empty(0), ())

    def _samples(self, urls: list[str], worker: int) -> Iterator[dict[str, Any]]:
        """webdataset's samples through a shuffle buffer; endlessly, with the shards in another order each time."""
        import webdataset

        order = np.random.default_rng([self.seed, self.rank, worker, self.start_step])
        while True:
            shuffled = [urls[number] for number in order.permutation(len(urls))]
            pipeline = webdataset.DataPipeline(
                webdataset.SimpleShardList(shuffled),
                partial(webdataset.tariterators.url_opener, handler=self._broken),
                self._members,
                partial(webdataset.tariterators.group_by_keys, handler=self._broken),
                webdataset.shuffle(_SHUFFLED, rng=random.Random(int(order.integers(2**32)))),
            )
            empty = True
            for sample in pipeline:
                empty = False
                yield sample
            if empty:
                reason = f" ({self._faults[-1].reason})" if self._faults else ""
                raise UserError(f"shards at {urls[0]}: the stream holds no samples{reason}")

    def _members(self, sources: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Replaces webdataset's own walk, which treats a damaged or truncated tar as its end."""
        for source in sources:
            url, stream = str(source["url"]), source["stream"]
            file = ForwardFile(url, stream)
            try:
                for member in tar.members(file):
                    if member.refused:
                        self._faults.append(Fault(url, member.key_and_extension[0], member.offset, member.refused))
                        continue
                    content = file.read(member.offset, member.size)
                    if len(content) < member.size:
                        raise tar.BrokenTar(member.offset, f"truncated (a member of {member.size} bytes)")
                    yield {"fname": member.name, "data": content, "__url__": url}
                stream.close()  # raises if a command has failed
            except (tar.BrokenTar, OSError) as error:
                self._broken(error, url)
            finally:
                with suppress(OSError):
                    stream.close()
            yield {}  # so that samples of two shards are not merged

    def _broken(self, error: Exception, url: str = "") -> bool:
        """Also webdataset's error handler. Lost samples of a stream cannot be counted, so the run ends."""
        reason = " ".join(str(error).split())
        raise UserError(f"stream of {url or self.urls[0]}: broken ({reason})") from None

    def _read(self, sample: dict[str, Any]) -> tuple[Any, int] | Fault:
        place = str(sample.get("__url__", "?")), str(sample["__key__"])
        kind = next((kind for kind in KINDS if kind in sample), None)
        if kind is None:
            return Fault(*place, 0, f"no .{', .'.join(KINDS)} member")
        members: dict[str, Callable[[], bytes]] = {
            name: io.BytesIO(sample[name]).read for name in EXTENSIONS if name in sample
        }
        try:
            label = self.labels.find(members)
            if not 0 <= label < self.num_classes:
                return Fault(*place, 0, f"label {label} is not in 0..{self.num_classes - 1}")
            return self._decode(sample[kind]), label
        except (NoLabel, UndecodableImage) as error:
            return Fault(*place, 0, str(error))
