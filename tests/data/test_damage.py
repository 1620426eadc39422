"""Every kind of damage, met by `verify` and by a run: found, with the right count, and without a hang."""

import io
import itertools
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.loading.evaluation_loader import EvaluationLoader
from scalevit.data.loading.train_loader import TrainLoader
from scalevit.data.order.shuffle import Order
from scalevit.data.shards.discovery import find_shards
from scalevit.data.shards.index import load_index
from scalevit.data.shards.verify import verify_shards
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError

PER_SHARD = 6
CLASSES = 3


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(seed):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((60, 50), Image.Resampling.BICUBIC)


SAMPLES = [(f"n{n:02d}", "jpg", encoded(picture(n)), n % CLASSES) for n in range(3 * PER_SHARD)]


def as_tensor(image):
    return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1)


def members_of(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]


def rewrite(path, members, *, link=None):
    """A shard of another maker: without description, so that only the tar can tell."""
    path.with_suffix(".json").unlink()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == link:
                info.size, info.type, info.linkname = 0, tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "set"
    write_samples(SAMPLES, folder, shard_size=PER_SHARD)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A fresh copy, of whose second shard each test damages something."""
    return Path(shutil.copytree(whole, tmp_path / "set", ignore=shutil.ignore_patterns(".*")))


def verified(folder, **settings):
    """Good samples and faults over all shards."""
    reports = list(verify_shards(find_shards(folder), num_classes=CLASSES, **settings))
    return sum(report.good for report in reports), [fault for report in reports for fault in report.faults]


class Recording(ShardDataset):
    """Keeps the numbers of the samples that are used for training, in this process."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.used = []

    def copies(self, *arguments):
        made = super().copies(*arguments)
        self.used.append(made.sample)
        return made


def run(folder, workers=0):
    """Faults that one epoch of training and one evaluation of two ranks find; the samples that were shown."""
    index = load_index(folder)
    index.check_labels(CLASSES)
    dataset, faults, evaluated = Recording(index, as_tensor), list(index.faults), 0
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "workers": workers}
        loader = TrainLoader(dataset, Order(len(index), 0), global_batch=6, micro_batch=3, **place)
        for batch in itertools.islice(loader.batches(0), loader.steps_in(1) * loader.split.loads):
            faults += batch.faults
        for batch in EvaluationLoader(dataset, batch=4, **place):
            faults += batch.faults
            evaluated += int(batch.weights.sum())
    assert evaluated == len(index)
    return {(fault.shard, fault.offset): fault for fault in faults}, dataset.used


def test_nothing_wrong(folder):
    assert verified(folder) == (18, [])
    faults, shown = run(folder)
    assert not faults
    assert sorted(shown) == list(range(18))


def layout(path):
    """Offsets of the headers of the members, and of the end mark."""
    with tarfile.open(path) as tar:
        found = tar.getmembers()
    last = found[-1].offset_data + -(-found[-1].size // 512) * 512
    return [member.offset for member in found], last


def structural(name):
    """What does the damage to a path, and returns how many of the shard's samples verify still finds good."""

    def damage(path):
        content = bytearray(path.read_bytes())
        headers, end = layout(path)
        third = headers[4]  # of the third sample's image
        match name:
            case "empty file":
                content, good = b"", 0
            case "cut in the first header":
                content, good = content[:100], 0
            case "cut in a header":
                content, good = content[: third + 200], 2
            case "cut between members of a sample":
                content, good = content[: headers[5]], 2
            case "cut between samples":
                content, good = content[:third], 2
            case "cut in an image":
                content, good = content[: third + 700], 2
            case "cut in a label":
                content, good = content[: headers[5] + 512 + 1], 3  # a label of one byte is whole
            case "cut before the end mark":
                content, good = content[:end], 6
            case "cut in the end mark":
                content, good = content[: end + 512], 6
            case "garbage header":
                content[third : third + 512], good = bytes([7]) * 512, 5
            case "zeroed header":
                content[third : third + 512], good = bytes(512), 5
            case "one flipped bit in a header":
                content[third + 3] ^= 1
                good = 5
            case "garbage label header":
                content[headers[5] : headers[5] + 512], good = bytes([7]) * 512, 5
        path.write_bytes(content)
        return good

    return damage


@pytest.mark.parametrize(
    "name",
    [
        "empty file", "cut in the first header", "cut in a header", "cut between members of a sample",
        "cut between samples", "cut in an image", "cut in a label", "cut before the end mark", "cut in the end mark",
        "garbage header", "zeroed header", "one flipped bit in a header", "garbage label header",
    ],
)  # fmt: skip
@pytest.mark.parametrize("described", [True, False])
def test_broken_tars(folder, name, described):
    path = folder / "shard-000001.tar"
    good = structural(name)(path)
    if not described:
        path.with_suffix(".json").unlink()
    count, faults = verified(folder)
    assert count == 12 + good, faults
    assert faults
    assert {fault.shard for fault in faults} == {str(path)}
    with pytest.raises(UserError, match=r"shard .*shard-000001\.tar, offset \d+: .*1 of 3 shards") as caught:
        run(folder)
    if described and good in (0, 2, 3):
        # Complete samples before the break; the walk of a run ends there.
        assert f"{6 - good} of 6 samples are lost" in str(caught.value)
    assert "\n" not in str(caught.value)


def bomb():
    content = bytearray(encoded(Image.new("L", (8, 8))))
    size = content.index(b"\xff\xc0") + 5
    content[size : size + 4] = (20_000).to_bytes(2, "big") * 2
    return bytes(content)


def put(content, name="n08.jpg"):
    def change(members):
        members[4] = (name, content)

    return change


BAD_SAMPLES = {
    "truncated JPEG": (put(SAMPLES[8][2][:-400]), "cannot be decoded"),
    "no image": (put(b"hello"), "unknown image format"),
    "empty image": (put(b""), "unknown image format"),
    "header bomb": (put(bomb()), "400000000 pixels"),
    "absurd shape": (put(encoded(Image.new("L", (1, 60_000)))), "one side is over 200 times the other"),
    "missing label": (lambda members: members.pop(5), "no .cls"),
    "missing image": (lambda members: members.pop(4), "no .jpg"),
    "label that is no number": (lambda members: members.__setitem__(5, ("n08.cls", b"cat")), "not an integer"),
    "duplicate key": (lambda members: members.extend(members[4:6]), "occurs a second time"),
    "path traversal": (
        lambda members: members.__setitem__(slice(4, 6), [("../n08.jpg", b""), ("../n08.cls", b"1")]),
        "leaves its folder",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples(folder, name):
    change, reason = BAD_SAMPLES[name]
    path = folder / "shard-000001.tar"
    members = members_of(path)
    change(members)
    rewrite(path, members)
    good = 18 if name == "duplicate key" else 17
    count, faults = verified(folder)
    assert count == good
    (fault,) = faults
    assert fault.shard == str(path)
    assert fault.key.endswith("n08")
    assert reason in fault.reason
    found, _ = run(folder)
    ((place, same),) = found.items()
    assert (place, same.key) == ((fault.shard, fault.offset), fault.key)
    assert reason in same.reason


def test_a_link(folder):
    path = folder / "shard-000001.tar"
    rewrite(path, members_of(path), link="n08.jpg")
    _, (fault,) = verified(folder)
    assert "is a link" in fault.reason
    found, _ = run(folder, workers=1)
    assert list(found.values()) == [fault]


def test_flipped_payload_bytes(folder):
    """In place: the tar stays whole, and a decoder may see nothing."""
    path = folder / "shard-000001.tar"
    members = members_of(path)
    headers, _ = layout(path)
    content = bytearray(path.read_bytes())
    content[headers[4] + 512 + len(members[4][1]) // 2] ^= 0x55
    path.write_bytes(content)
    count, faults = verified(folder)
    assert count == 17
    assert [(fault.key, fault.reason) for fault in faults] == [
        ("", "its bytes have changed since it was written (wrong SHA-256)"),
        ("n08", "the image's bytes have changed (wrong checksum)"),
    ]
    found, shown = run(folder)
    assert list(found.values()) == faults[1:]
    assert 8 not in shown


def test_label_out_of_range(folder):
    path = folder / "shard-000001.tar"
    members = members_of(path)
    members[5] = ("n08.cls", b"3")
    rewrite(path, members)
    count, (fault,) = verified(folder)
    assert (count, fault.key, fault.reason) == (17, "n08", "label 3 is not in 0..2")
    with pytest.raises(UserError, match=r"key 'n08'.*label 3 is not in 0\.\.2 \(1 of 18 samples; "):
        run(folder)


def test_empty_and_missing_shards(folder):
    path = folder / "shard-000001.tar"
    rewrite(path, [])
    count, (fault,) = verified(folder)
    assert (count, fault.reason) == (12, "holds no samples")
    with pytest.raises(UserError, match="holds no samples"):
        run(folder)
    path.unlink()
    for call in (verified, run):
        with pytest.raises(UserError, match="1 of 3 are missing, first shard-000001"):
            call(folder)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (encoded(picture(8), "PNG"), "png named jpg"),
        (encoded(picture(8).convert("CMYK")), "mode CMYK"),
        (encoded(picture(8).convert("L")), "mode L"),
        (encoded(Image.new("RGB", (1, 1))), "a side under 8 pixels"),
    ],
)
def test_odd_but_usable_images_are_used_and_noted(folder, content, note):
    path = folder / "shard-000001.tar"
    members = members_of(path)
    put(content)(members)
    rewrite(path, members)
    reports = list(verify_shards(find_shards(folder)))
    assert [dict(report.notes) for report in reports] == [{}, {note: 1}, {}]
    assert verified(folder) == (18, [])
    faults, shown = run(folder)
    assert not faults
    assert sorted(shown) == list(range(18))


def test_verify_by_processes(folder):
    (folder / "shard-000002.tar").write_bytes(b"")
    alone, together = (list(verify_shards(find_shards(folder), workers=workers)) for workers in (0, 2))
    assert alone == together
