"""Small shards that the data tests share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalevit.data.builtin import ensure_digits
from scalevit.data.shards.index import Index, load_index
from scalevit.data.writing.writer import write_image_folder


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
def digits(tmp_path_factory) -> Path:
    """A folder with train and validation."""
    folder = tmp_path_factory.mktemp("digits")
    ensure_digits(folder / "train", folder / "validation")
    return folder
