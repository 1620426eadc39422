"""Small shards that the data tests share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalevit.data.images import encode_png
from scalevit.data.loading.dataset import ShardDataset
from scalevit.data.shards.index import Index, load_index
from scalevit.data.transforms.base import TrainingAugmentation
from scalevit.data.transforms.timm_pipeline import evaluation_transform, training_transform
from scalevit.data.writing.writer import write_image_folder, write_samples


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Three classes of 7, 8 and 8 images: JPEG, grey JPEG, CMYK JPEG, PNG and a PNG that is named jpg."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee", "cow")):
        (folder / name).mkdir()
        for number in range(7 + (label > 0)):
            # Smooth, so that JPEG keeps it nearly as it was.
            small = noise.integers(0, 256, (4, 5, 3), np.uint8)
            image = Image.fromarray(small).resize((50, 40), Image.Resampling.BICUBIC)
            match number:
                case 0:
                    image.convert("L").save(folder / name / "grey.jpg")
                case 1:
                    image.convert("CMYK").save(folder / name / "cmyk.JPEG", "JPEG")
                case 2:
                    image.save(folder / name / "lossless.png")
                case 3:
                    image.save(folder / name / "png.named.jpg", "PNG")
                case _:
                    image.save(folder / name / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def shards(image_folder, tmp_path_factory) -> Path:
    """The 23 images as three shards."""
    destination = tmp_path_factory.mktemp("shards") / "train"
    write_image_folder(image_folder, destination, shard_size=10, seed=3)
    return destination


@pytest.fixture(scope="session")
def index(shards) -> Index:
    return load_index(shards)


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """Data sets for training and for evaluation of 45 grey images. Number n has value n, which crops and flips do not
    change, and label n."""
    folder = tmp_path_factory.mktemp("numbered") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((8, 8), n, np.uint8)), n) for n in range(45)]
    write_samples(samples, folder, shard_size=20)
    index = load_index(folder)
    transform = training_transform(TrainingAugmentation(image_size=8, mean=(0, 0, 0), color_jitter=0))
    return ShardDataset(index, transform), ShardDataset(index, evaluation_transform(image_size=8, crop_pct=1.0))


@pytest.fixture(scope="session")
def damaged(tmp_path_factory):
    """The same with 20 images, of which 3, 8 and 9 cannot be decoded."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    samples = [(f"n{n}", "png", encode_png(np.full((8, 8), n, np.uint8)), n) for n in range(20)]
    for bad in (3, 8, 9):
        samples[bad] = (f"bad{bad}", "png", b"no image %d" % bad, bad)
    write_samples(samples, folder, shard_size=7)
    index = load_index(folder)
    transform = training_transform(TrainingAugmentation(image_size=8, mean=(0, 0, 0), color_jitter=0))
    return ShardDataset(index, transform), ShardDataset(index, evaluation_transform(image_size=8, crop_pct=1.0))
