import io
import os
import tarfile

import numpy as np
import pytest

from scalevit.data.images import KINDS
from scalevit.data.index import Index, find_shards, load_index
from scalevit.data.shards import write_samples
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
            found[index.describe(n).split("'")[1]] = (
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
    def no_walk(path):
        raise AssertionError("walked again")

    write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", b"1")])
    first = load_index(tmp_path)
    (saved,) = tmp_path.glob(".index-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr("scalevit.data.tar.members", no_walk)
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
        ("SHARDS/none", "no shards at SHARDS/none: make them with `scalevit shards write --source IMAGES "),
        ("SHARDS/none", "--destination SHARDS/none`"),
        ("SHARDS/none/*.tar", "--destination SHARDS/none`"),
        ("SHARDS/none/{00..11}.tar", "--destination SHARDS/none`"),
        ("SHARDS/shard-{000000..000005}.tar", "3 of 6 are missing, first SHARDS/shard-000003.tar"),
        ("SHARDS/shard-{000000.tar", "the braces do not match"),
        ("s3://bucket/train", "only local files"),
    ],
)
def test_missing_shards(shards, pattern, message):
    with pytest.raises(UserError) as caught:
        find_shards(pattern.replace("SHARDS", str(shards)))
    assert message.replace("SHARDS", str(shards)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=f"no shards at {tmp_path}: make them with"):
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


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "holds no samples"),
        ([("a.png", b"x")], "key 'a' has no .cls"),
        ([("a.cls", b"0"), *GOOD[2:]], "key 'a' has no .jpg"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], "offset 1536: the key 'a' has two of .jpg"),
        ([*GOOD, *GOOD], "offset 5632: the key 'a' comes a second time"),
        ([("a.png", b"x"), ("a.cls", b"cat")], "key 'a', offset 1536: the label 'cat' is not an integer"),
        ([("a.png", b"x"), ("a.cls", b"")], "the label '' is not an integer"),
        ([("a.png", b"x"), ("a.cls", b"9" * 600)], "is not an integer"),
    ],
)
def test_bad_samples(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        load_index(tmp_path)
    assert str(tmp_path / "a.tar") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"offset 0: the member 'a\.png' is a link"):
        load_index(tmp_path)


def test_labels_out_of_range(tmp_path):
    write_samples([("a", "png", b"", 0), ("b", "png", b"", 10), ("c", "png", b"", 3)], tmp_path / "s", total=3)
    index: Index = load_index(tmp_path / "s")
    index.check_labels(11)
    with pytest.raises(UserError, match=r"shard-000000\.tar, key 'b', .*label 10 is not in 0\.\.9 \(1 of 3 samples\)"):
        index.check_labels(10)
