"""Training batches from a stream: pipes, and servers that give no ranges. Not exactly resumable.

webdataset's pipeline reads whole shards from their beginning, so there is no place to go on from: a resumed run starts
its shards anew under another seed and will show some samples again and others later. The order depends on the number
of ranks and workers. Use it only where shards cannot be read at any offset. Bad samples are skipped, as there is no
other at hand, but listed and counted like all others. Must not know models, engines or process groups.
"""

import io
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
from scalevit.data.images import KINDS, UndecodableImage, decode, decode_pixels
from scalevit.data.loading import train_loader as loader
from scalevit.data.loading.dataset import PixelTransform, Transform
from scalevit.data.loading.shared_buffers import Stack
from scalevit.data.order.batching import Batching
from scalevit.data.shards import labels, tar
from scalevit.data.shards.discovery import expand_braces
from scalevit.data.storage.files import ForwardFile
from scalevit.errors import UserError
from scalevit.randomness import hash64, seed_sample

_SHUFFLED = 1000


class StreamLoader:
    """As `loader.TrainLoader`, from a stream.

    Args:
        pattern: addresses or `pipe:` commands with braces; at least as many shards as ranks times workers.
        transform: as for `ShardDataset`.
        samples: how many an epoch has, which a stream does not tell.
        num_classes: labels must be below it.
        seed: of the order and the augmentation.
        label_key: of labels in `.json` members.
        global_batch, micro_batch, rank, world_size, workers, pin_memory, finish: as for `TrainLoader`.

    Raises:
        UserError: too few shards for the ranks and workers, or batch sizes that the ranks cannot share.
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
        label_key: str = labels.DEFAULT_KEY,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        finish: loader.Finisher | None = None,
    ) -> None:
        self.finish = finish or loader.unchanged
        self.samples, self.seed = samples, seed
        self.batching = Batching(global_batch, micro_batch)
        self.accumulation = self.batching.accumulation(world_size)
        urls = expand_braces(pattern)
        if len(urls) < world_size * max(1, workers):
            raise UserError(
                f"shards at {pattern}: {len(urls)} cannot be streamed by {world_size} ranks of {workers} workers: each "
                "needs a shard of its own; use fewer data.workers"
            )
        self._stream = _Stream(urls[rank::world_size], transform, seed, rank, label_key, num_classes, micro_batch)
        self._rank, self._world_size = rank, world_size
        self._workers, self._pin_memory = workers, pin_memory

    @property
    def index_faults(self) -> Sequence[Fault]:
        """None that are known before they are met."""
        return ()

    @property
    def fingerprint(self) -> loader.Fingerprint:
        """Says that there is none: a stream has no place to go on from."""
        return {"streaming": "not exactly resumable", "samples": self.samples, "seed": self.seed}

    def batches(self, start_step: int) -> Iterator[loader.Batch]:
        """Endless micro-batches, whose images hold as long as those of `TrainLoader`; `start_step` counts, and changes
        the seed, but skips nothing.

        Raises:
            UserError: while iterating: a shard cannot be streamed.
        """
        stream = copy(self._stream)
        stream.start_step = start_step
        stream.stack = Stack(held=self.accumulation, workers=self._workers)
        parts = loader.data_loader(stream, None, self._workers, self._pin_memory, keep_workers=False)
        step, index = start_step, 0
        for part in loader.items(parts):
            number = index * self._world_size + self._rank
            yield part._replace(step=step, micro_batch=number)
            index += 1
            if index == self.accumulation:
                step, index = step + 1, 0

    def epoch_end_step(self, epoch: int) -> int:
        """As for `TrainLoader`."""
        return -(-(epoch + 1) * self.samples // self.batching.global_batch)

    def steps_in(self, epochs: int) -> int:
        """As for `TrainLoader`."""
        return self.epoch_end_step(epochs - 1)


class _Stream(IterableDataset[Any]):
    """Batches of one worker, endless."""

    def __init__(
        self,
        urls: list[str],
        transform: Transform,
        seed: int,
        rank: int,
        label_key: str,
        num_classes: int,
        micro_batch: int,
    ) -> None:
        self.urls, self.transform, self.seed, self.rank = urls, transform, seed, rank
        self.label_key, self.num_classes, self.micro_batch = label_key, num_classes, micro_batch
        self.start_step = 0
        self.stack = Stack(held=1, workers=0)
        self._faults: list[Fault] = []

    def __iter__(self) -> Iterator[loader.Batch | UserError]:
        try:
            yield from self._batches()
        except UserError as error:
            while True:  # a worker that ended would leave its turns to the others, see `Stack`
                yield error

    def _batches(self) -> Iterator[loader.Batch]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        tensors: list[torch.Tensor] = []
        shown: list[int] = []
        for position, sample in enumerate(self._samples(self.urls[number::count], number)):
            read = self._read(sample)
            if isinstance(read, Fault):
                self._faults.append(read)
                continue
            image, label = read
            # As wide apart as workers and restarts are, so that no two samples share their randomness.
            seed_sample(hash64(self.seed, self.rank, number, self.start_step), position, 0)
            tensors.append(self.transform(image))
            shown.append(label)
            if len(tensors) == self.micro_batch:
                unknown = torch.full((self.micro_batch,), -1)
                faults, self._faults = self._faults, []
                yield loader.Batch(self.stack(tensors), torch.tensor(shown), 0, 0, unknown, faults)
                tensors, shown = [], []

    def _samples(self, urls: list[str], worker: int) -> Iterator[dict[str, Any]]:
        """webdataset's samples, shuffled through a buffer, over all shards again and again in another order."""
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
        """Instead of webdataset's own walk, which takes whatever ends a tar for its end."""
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
            yield {}  # so that samples of two shards are not mixed up

    def _broken(self, error: Exception, url: str = "") -> bool:
        """Also webdataset's handler: what is lost of a stream cannot be counted, so it ends the run."""
        reason = " ".join(str(error).split())
        raise UserError(f"stream of {url or self.urls[0]}: broken ({reason})") from None

    def _read(self, sample: dict[str, Any]) -> tuple[Any, int] | Fault:
        place = str(sample.get("__url__", "?")), str(sample["__key__"])
        kind = next((kind for kind in KINDS if kind in sample), None)
        if kind is None:
            return Fault(*place, 0, f"no .{', .'.join(KINDS)} member")
        members: dict[str, Callable[[], bytes]] = {
            name: io.BytesIO(sample[name]).read for name in labels.EXTENSIONS if name in sample
        }
        try:
            label = labels.find_label(members, self.label_key)
            if not 0 <= label < self.num_classes:
                return Fault(*place, 0, f"label {label} is not in 0..{self.num_classes - 1}")
            decoder: Callable[[bytes], Any] = decode_pixels if isinstance(self.transform, PixelTransform) else decode
            return decoder(sample[kind]), label
        except (labels.NoLabel, UndecodableImage) as error:
            return Fault(*place, 0, str(error))
