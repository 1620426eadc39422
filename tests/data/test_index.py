import io
import os
import shutil
import tarfile
import zlib

import numpy as np
import pytest

from scalevit.data.images import KINDS
from scalevit.data.shards.discovery import find_shards
from scalevit.data.shards.index import Index, load_index
from scalevit.data.shards.labels import LabelFormat
from scalevit.data.writing.writer import write_samples
from scalevit.errors import UserError


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """members: (name, content) pairs."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_dict(index):
    """What the index says of every key, read through it."""
    found = {}
    for n in range(len(index)):
        with open(index.shards[index.shard[n]].path, "rb") as file:
            file.seek(index.offset[n])
            found[index.key(n)] = (
                file.read(index.size[n]),
                KINDS[index.kind[n]],
                int(index.label[n]),
            )
    return found


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_of_tars_by_others(tmp_path, format):
    """Long names, folders, further fields, upper case, and members in any order within a sample."""
    long = "deep/" * 30 + "x" * 60
    samples = [
        ("a.cls", b"3"),
        ("a.json", b"{}"),
        ("a.jpg", b"J" * 700),
        ("deep/b.JPEG", b""),
        ("deep/b.cls", b" 0\n"),
        ("__info__.txt", b"not a sample"),
        (f"{long}.webp", b"W" * 512),
        (f"{long}.cls", b"-12"),
        ("é.png", b"P"),
        ("é.cls", b"7"),
    ]
    write_tar(tmp_path / "a.tar", samples, format)
    index = load_index(tmp_path)
    assert index.label.tolist() == [3, 0, -12, 7]
    assert [KINDS[kind] for kind in index.kind] == ["jpg", "jpeg", "webp", "png"]
    assert index.size.tolist() == [700, 0, 512, 1]
    with open(tmp_path / "a.tar", "rb") as file:
        for offset, size, expected in zip(index.offset, index.size, (b"J" * 700, b"", b"W" * 512, b"P"), strict=True):
            file.seek(offset)
            assert file.read(size) == expected


def test_index_of_our_shards(index, image_folder):
    assert len(index) == 23
    assert len(index.shards) == 3
    assert np.bincount(index.label).tolist() == [7, 8, 8]
    files = [path.read_bytes() for path in image_folder.rglob("*.*")]
    assert sorted(payload for payload, _, _ in as_dict(index).values()) == sorted(files)


def test_saved_index_is_used_and_renewed(tmp_path, monkeypatch):
    def no_walk(*arguments, **settings):
        raise AssertionError("walked again")

    write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", b"1")])
    first = load_index(tmp_path)
    (saved,) = tmp_path.glob(".index-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("scalevit.data.shards.tar.members", no_walk)
        again = load_index(tmp_path)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.offset, first.offset)
    # A torn file is made again, and so is one of a shard that has changed.
    saved.write_bytes(saved.read_bytes()[:-20])
    assert load_index(tmp_path).fingerprint == first.fingerprint
    write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", b"2")])
    os.utime(tmp_path / "a.tar", ns=(0, 0))
    changed = load_index(tmp_path)
    assert changed.label.tolist() == [2]
    assert changed.fingerprint != first.fingerprint


def test_unwritable_folder_is_indexed_in_memory(tmp_path, monkeypatch):
    """By a failing write, since the tests may run as root."""
    write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", b"1")])

    def full(file, **arrays):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(load_index(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_patterns(shards):
    names = [str(shards / f"shard-{n:06d}.tar") for n in range(3)]
    assert find_shards(shards) == find_shards(f"{shards}/") == names
    assert find_shards(f"{shards}/*1.tar") == names[1:2]
    assert find_shards(f"{shards}/shard-{{000000..000001}}.tar") == names[:2]
    assert find_shards(names[2]) == names[2:]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("SHARDS/none", "no shards at SHARDS/none: create them with `scalevit shards write --source IMAGES "),
        ("SHARDS/none", "--destination SHARDS/none`"),
        ("SHARDS/none/*.tar", "--destination SHARDS/none`"),
        ("SHARDS/none/{00..11}.tar", "--destination SHARDS/none`"),
        ("SHARDS/shard-{000000..000005}.tar", "3 of 6 are missing, first SHARDS/shard-000003.tar"),
        ("SHARDS/shard-{000000.tar", "the braces do not match"),
        ("pipe:cat SHARDS/a.tar", "the output of a command can only be streamed"),
    ],
)
def test_missing_shards(shards, pattern, message):
    with pytest.raises(UserError) as caught:
        find_shards(pattern.replace("SHARDS", str(shards)))
    assert message.replace("SHARDS", str(shards)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=f"no shards at {tmp_path}: create them with"):
        load_index(tmp_path)


GOOD = [("a.png", b"x" * 600), ("a.cls", b"1"), ("b.png", b"y" * 600), ("b.cls", b"0")]


def cut(size):
    return lambda content: content[:size]


def overwrite(offset, new):
    return lambda content: content[:offset] + new + content[offset + len(new) :]


# A member takes a header of 512 bytes and its content in whole blocks: a.png 0..1536, a.cls ..2560, b.png ..4096,
# b.cls ..5120, then the end mark.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(0), "offset 0: truncated"),
        (cut(300), "offset 0: truncated"),
        (cut(700), "offset 0: truncated"),
        (cut(2560), "offset 2560: truncated"),
        (cut(3500), "offset 2560: truncated"),
        (cut(4000), "offset 4096: truncated"),
        (cut(5120), "offset 5120: truncated"),
        (cut(5120 + 512), "offset 5120: truncated"),
        (overwrite(2560, b"?" * 512), "offset 2560: no tar header"),
        (overwrite(2560, bytes(512)), "offset 2560: broken"),
        (overwrite(2560 + 124, b"7"), "offset 2560: no tar header"),
        (overwrite(6000, b"?"), "offset 5120: broken"),
    ],
)
def test_damaged_tars(tmp_path, damage, message):
    path = tmp_path / "a.tar"
    write_tar(path, GOOD)
    assert len(load_index(tmp_path)) == 2
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        load_index(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_shard_is_told_with_the_number_of_damaged_ones(tmp_path):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", GOOD)
    for name in "bc":
        path = tmp_path / f"{name}.tar"
        path.write_bytes(path.read_bytes()[:2560])
    with pytest.raises(UserError, match=r"shard .*b\.tar, offset 2560: .*\(2 of 3 shards are damaged"):
        load_index(tmp_path)


def test_no_samples(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="holds no samples"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("members", "key", "offset", "reason"),
    [
        ([("c.png", b"x")], "c", 5632, "no .cls, no .json with 'label' and no .txt member"),
        ([("c.cls", b"0")], "c", 5632, "no .jpg, .jpeg, .png, .webp member"),
        ([("c.png", b"x"), ("c.jpg", b"x"), ("c.cls", b"0")], "c", 5632, "the key 'c' has two images"),
        ([("c.cls", b"1"), ("c.png", b"x"), ("c.cls", b"0")], "c", 6656, "the key 'c' has two members .cls"),
        (GOOD[:2], "a", 5632, "the key 'a' occurs a second time"),
        ([("c.png", b"x"), ("c.cls", b"cat")], "c", 5632, "the label 'cat' of .cls is not an integer"),
        ([("c.png", b"x"), ("c.cls", b"")], "c", 5632, "the label '' of .cls is not an integer"),
        ([("c.png", b"x"), ("c.cls", b"9" * 600)], "c", 5632, "the label '99999999999999999999' of .cls is not"),
        ([("c.png", b"x"), ("c.json", b"{")], "c", 5632, "the .json member is not JSON"),
        ([("c.png", b"x"), ("c.json", b'{"label": 1.5}')], "c", 5632, "the label '1.5' of .json under 'label' is not"),
        ([("c.png", b"x"), ("c.txt", b"a caption")], "c", 5632, "the label 'a caption' of .txt is not an integer"),
        ([("../c.png", b"x"), ("../c.cls", b"1")], "../c", 5632, "the name '../c.png' leaves its folder"),
        ([("/etc/c.png", b"x"), ("/etc/c.cls", b"1")], "/etc/c", 5632, "the name '/etc/c.png' leaves its folder"),
    ],
)
def test_bad_samples_are_left_out_and_listed(tmp_path, members, key, offset, reason):
    write_tar(tmp_path / "a.tar", [*GOOD, *members])
    for _ in range(2):  # walked, and from the saved index
        index = load_index(tmp_path)
        assert index.label.tolist() == [1, 0]
        (fault,) = index.faults
        assert (fault.shard, fault.key, fault.offset) == (str(tmp_path / "a.tar"), key, offset)
        assert fault.reason.startswith(reason)
        assert "\n" not in str(fault)


def test_nothing_but_bad_samples(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("b.png", b"x")])
    with pytest.raises(UserError, match=r"key 'a'.*: no \.cls.*; none of 2 samples can be used"):
        load_index(tmp_path)


def test_labels_from_json_and_txt(tmp_path):
    """As img2dataset and others write them; a .txt beside another label is a caption."""
    large = b'{"url": "' + b"x" * 2000 + b'", "label": 3, "class_id": "-4"}'
    members = [
        ("a.jpg", b"x"), ("a.json", large), ("a.txt", b"a caption"),
        ("b.txt", b" 5\n"), ("b.webp", b"x"), ("b.json", b'{"width": 3, "class_id": 6}'),
        ("c.jpeg", b"x"), ("c.cls", b"7"), ("c.json", b'{"label": 8, "class_id": 8}'),
    ]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    assert load_index(tmp_path).label.tolist() == [3, 5, 7]
    # The key is part of the saved index.
    assert load_index(tmp_path, labels=LabelFormat("class_id")).label.tolist() == [-4, 6, 7]
    assert load_index(tmp_path).label.tolist() == [3, 5, 7]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    write_tar(tmp_path / "a.tar", GOOD)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info = tarfile.TarInfo("c.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        info = tarfile.TarInfo("c.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    (fault,) = load_index(tmp_path).faults
    assert (fault.key, fault.offset) == ("c", 5632)
    assert fault.reason.startswith("the member 'c.png' is ")


def test_absurd_sizes_are_refused(tmp_path):
    """A sparse file: two gigabytes of nothing as an image, and an extended header that large."""
    for kind, message in ((tarfile.REGTYPE, "2147483648 bytes, more than"), (b"x", "an extended header of 2147483648")):
        info = tarfile.TarInfo("c.png")
        info.size, info.type = 1 << 31, kind
        end = (1 << 31) + 512
        with open(tmp_path / "a.tar", "wb") as file:
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.truncate(end + 1024)
        with pytest.raises(UserError, match=message):
            load_index(tmp_path)


def test_a_missing_shard_is_noticed(shards, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    assert len(load_index(folder)) == 23
    (folder / "shard-000001.tar").rename(folder / "other.tar")
    with pytest.raises(UserError, match=r"1 of 3 are missing, first shard-000001\.tar"):
        load_index(folder)
    shutil.copy(folder / "other.tar", folder / "shard-000001.tar")
    with pytest.raises(UserError, match=r"other\.tar is not part of the set"):
        load_index(folder)


def test_a_shard_of_whole_samples_that_are_too_few(shards, tmp_path):
    """Cut at a sample and ended properly: only the description tells."""
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        kept = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()[:12]]
    write_tar(path, kept)
    with pytest.raises(UserError, match=r"shard-000000\.tar: has \d+ bytes, but \d+ were written"):
        load_index(folder)


def test_checksums(shards, tmp_path):
    index = load_index(shards)
    payloads = as_dict(index)
    assert index.crc32.tolist() == [zlib.crc32(payloads[index.key(n)][0]) for n in range(23)]
    shutil.copytree(shards, tmp_path / "set", ignore=shutil.ignore_patterns("*.json", ".*"))
    copy = load_index(tmp_path / "set")
    assert set(copy.crc32.tolist()) == {-1}
    assert copy.fingerprint == index.fingerprint
    for checksums in (True, False):  # read once, and kept
        assert load_index(tmp_path / "set", checksums=checksums).crc32.tolist() == index.crc32.tolist()


def test_labels_out_of_range(tmp_path):
    write_samples([("a", "png", b"", 0), ("b", "png", b"", 10), ("c", "png", b"", 3)], tmp_path / "s")
    index: Index = load_index(tmp_path / "s")
    index.check_labels(11)
    message = (
        r"num_classes = 10: .*000\.tar, key 'b', .*label 10 is not in 0\.\.9 \(1 of 3 samples; labels go from 0 to 10"
    )
    with pytest.raises(UserError, match=message):
        index.check_labels(10)
