"""Cases of tests/test_troubleshooting.py: messages about settings, data and the writing of shards."""

from pathlib import Path

import pytest

from message_case import Place, case
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.data.builtin import digits as digit_samples
from scalevit.data.faults import Fault, FaultLog
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import load_index
from scalevit.data.writing.writer import write_samples
from scalevit.errors import naming_settings, require

# --- settings and commands --------------------------------------------------------------------------------


@case("config: unknown key ...; nearest: ...")
def _(place: Place) -> None:
    place.prepare("train.epoch=3")


@case("config: ... was renamed to ...")
def _(place: Place) -> None:
    place.prepare("data.embedded=digits")


@case("config: ... = ...: must be ...")
def _(place: Place) -> None:
    place.prepare("train.precision=float16")


@case("config: schedule.warmup_epochs = ...: must be below train.epochs = ...")
def _(place: Place) -> None:
    place.prepare("train.epochs=2")


@case("config ...: no such file or preset; nearest: ... (presets: ...)")
def _(place: Place) -> None:
    load_config("grouqed")


@case("config ...: not valid JSON (...)")
def _(place: Place) -> None:
    Path("my.json").write_text('{"name": "photos",}')
    load_config("my.json")


@case("timm's command: unknown option ... (nearest: ...)")
def _(place: Place) -> None:
    main(["from-timm", "train.py --model vit_tiny_patch16_224 --weight-dcay 0.1"])


@case("timm's command gives no valid config: ... = ...: must be ... (from ...)")
def _(place: Place) -> None:
    main(["from-timm", "train.py --model vit_tiny_patch16_224 --epochs 3"])


@case("override ...: must have the form key.sub=value")
def _(place: Place) -> None:
    place.prepare("train.epochs")


@case("the package ... is not installed; install the extra: ...")
def _(place: Place) -> None:
    require("package_that_nobody_has", extra="wandb")


# --- data -------------------------------------------------------------------------------------------------


@case("no shards at ...: create them with `scalevit shards write ...`")
def _(place: Place) -> None:
    place.prepare("data.train=data/nowhere")


@case("no shards at ..., a folder of folders: ...")
def _(place: Place) -> None:
    place.images()
    place.prepare("data.train=photos")


@case("shards at ...: ... of ... are missing, first ...")
def _(place: Place) -> None:
    (place.folder / "shards" / "train" / "shard-000001.tar").unlink()
    place.prepare()


@case("shard ...: truncated ...")
def _(place: Place) -> None:
    shard = place.folder / "shards" / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    place.prepare()


@case("config: model.num_classes = ...: ... label ... is not in ...")
def _(place: Place) -> None:
    place.prepare("model.num_classes=1")


@case("shards at ...: class ... is not among the ... classes of the training set...")
def _(place: Place) -> None:
    write_samples(digit_samples()["validation"][:4], "other", classes=[f"new {number}" for number in range(10)])
    place.prepare("data.validation=other")


@case("config: train.global_batch = ...: must be at most the ... training images")
def _(place: Place) -> None:
    place.prepare("train.global_batch=64")


@case("shard ...: changed since it was indexed; start again")
def _(place: Place) -> None:
    index = load_index("shards/train")
    Path(index.shards[0].path).touch()
    ShardDataset(index, lambda image: image).image(0)


@case("config: data.max_faults = ...: found ... bad samples (last: ...): fix the shards or raise the limit")
def _(place: Place) -> None:
    with naming_settings({"limit": "data.max_faults"}):
        FaultLog(Path("data_faults.jsonl"), limit=0).add([Fault("shard-000000.tar", "n1", 512, "not an image")])


@case("...: the image's bytes have changed (wrong checksum)")
def _(place: Place) -> str:
    index = load_index("shards/train")
    shard = Path(index.shards[0].path)
    content = bytearray(shard.read_bytes())
    content[int(index.offset[0]) + 20] ^= 1
    shard.write_bytes(content)
    fault = ShardDataset(load_index("shards/train"), lambda image: image).image(0)
    assert isinstance(fault, Fault)
    return str(fault)


# --- writing shards ---------------------------------------------------------------------------------------


@case("images at ...: no such folder; ...")
def _(place: Place) -> None:
    place.write_shards()


@case("images at ...: no images in subfolders; ...")
def _(place: Place) -> None:
    (place.folder / "photos").mkdir()
    (place.folder / "photos" / "cat.jpg").touch()
    place.write_shards()


@case("image ...: cannot be decoded (...); replace or remove it, or allow ...")
def _(place: Place) -> None:
    place.images(b"no image")
    place.write_shards()


@case("shards at ...: none of the ... images can be used; ...")
def _(place: Place) -> None:
    place.images(b"no image")
    place.write_shards("--max-faults", "1")


@case("--max-faults = ...: found ... bad images ...: replace or remove them, or raise the limit")
def _(place: Place) -> None:
    place.images(b"no image")
    (place.folder / "photos" / "cat" / "1.png").write_bytes(b"no image")
    place.write_shards("--max-faults", "1")


@case("--image-column = ...: ... has the columns ...")
def _(place: Place) -> None:
    Path("list.csv").write_text("file,label\n0.png,cat\n")
    main(["shards", "write", "--table", "list.csv", "--destination", "out"])


@case("shards at ...: not an empty folder; remove it or name another destination")
def _(place: Place) -> None:
    place.images()
    place.write_shards()
    place.write_shards()


@case("shards at ...: were started with other settings (...): remove that folder to start again")
def _(place: Place) -> None:
    place.images(b"no image")
    with pytest.raises(SystemExit):
        place.write_shards()  # leaves out.partial
    place.write_shards("--seed", "7")


@case("class ... is not in the file of class names...")
def _(place: Place) -> None:
    place.images()
    Path("names.txt").write_text("dog\nowl\n")
    place.write_shards("--class-names", "names.txt")
