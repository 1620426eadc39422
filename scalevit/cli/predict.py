"""`scalevit predict`: classes and probabilities of images, by the weights of a run or by an export."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scalevit.cli.parsing import add_weight_set, integer
from scalevit.data.writing.sources.files import files_below, why_no_image
from scalevit.errors import UserError
from scalevit.export.source import find_source

if TYPE_CHECKING:
    from scalevit.export.prediction import Prediction

EXAMPLES = """\
  scalevit predict runs/photos cat.jpg dog.jpg
  scalevit predict runs/photos/final.safetensors holidays/ --top 3 --csv > predictions.csv
  scalevit predict runs/photos holidays/ --json --batch 64
  scalevit predict runs/photos/checkpoints/step-00001000 cat.jpg --weights weights
  scalevit predict photos.onnx cat.jpg    # what `scalevit export` wrote, in any form"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="RUN|CHECKPOINT|FILE|EXPORT",
        help="a run folder, whose best weights are taken, a checkpoint, a weights file, or an export",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--config", help="of the model; default: the config.json in the run folder or beside the file")
    add_weight_set(parser)
    parser.add_argument("--top", type=integer(1), default=5, help="classes of each image (default: %(default)s)")
    parser.add_argument("--batch", type=integer(1), default=32, help="images of a forward pass (default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON object per image")
    form.add_argument("--csv", action="store_true", help="print a line per image and class: image, rank, label, ...")


def run(arguments: argparse.Namespace) -> int:
    """Predicts, and prints as it goes. Returns 1 if an image could not be read, else 0.

    Raises:
        UserError: a mistake in the arguments or the weights.
    """
    source = find_source(arguments.target, config=arguments.config, weights=arguments.weights, config_required=False)
    if source.exporter is not None and arguments.config is not None:
        raise UserError(f"--config applies to runs, checkpoints and weights, and {source.path} is an export")
    paths = _images(arguments.images)
    # Imported late: a mistake in the arguments is reported before torch and timm are loaded, which takes seconds.
    from scalevit.export.classifier import open_classifier
    from scalevit.export.prediction import Predictor

    classifier = open_classifier(source)
    predictor = Predictor(classifier, exif_orientation=source.config.data.exif_orientation)
    print(f"weights: {source}", file=sys.stderr)
    predictions = predictor.predict(paths, top=arguments.top, batch=arguments.batch)
    write = _write_json if arguments.json else _write_csv if arguments.csv else _write_text
    failed = write(zip(paths, predictions, strict=True), classifier.classes)
    return 1 if failed else 0


def _images(given: Sequence[str]) -> list[Path]:
    """The files, and the images below the folders by their names.

    Raises:
        UserError: one does not exist, or a folder has no images.
    """
    found = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = [Path(file) for file in files_below(path) if _is_image(file)]
            if not inside:
                raise UserError(f"folder {path}: has no images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path}: no such file")
    return found


def _is_image(file: str) -> bool:
    return why_no_image(os.path.basename(file), convert=True) is None


_Predicted = Iterable[tuple[Path, "Prediction"]]


def _write_text(predicted: _Predicted, classes: Sequence[str] | None) -> int:
    failed = 0
    for path, prediction in predicted:
        if prediction.error is None:
            pairs = zip(prediction.labels, prediction.probabilities, strict=True)
            print(
                f"{path}: "
                + ", ".join(f"{_class_name(label, classes) or f'label {label}'} {value:.1%}" for label, value in pairs),
                flush=True,
            )
        else:
            failed += 1
            print(f"warning: image {path}: {prediction.error}", file=sys.stderr, flush=True)
    return failed


def _write_json(predicted: _Predicted, classes: Sequence[str] | None) -> int:
    failed = 0
    for path, prediction in predicted:
        if prediction.error is None:
            pairs = zip(prediction.labels, prediction.probabilities, strict=True)
            found = [
                {"label": label, "class": _class_name(label, classes), "probability": value} for label, value in pairs
            ]
            print(json.dumps({"image": str(path), "predictions": found}), flush=True)
        else:
            failed += 1
            print(json.dumps({"image": str(path), "error": prediction.error}), flush=True)
    return failed


def _write_csv(predicted: _Predicted, classes: Sequence[str] | None) -> int:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "label", "class", "probability"])
    failed = 0
    for path, prediction in predicted:
        if prediction.error is not None:
            failed += 1
            print(f"warning: image {path}: {prediction.error}", file=sys.stderr, flush=True)
        for rank, (label, value) in enumerate(zip(prediction.labels, prediction.probabilities, strict=True), 1):
            writer.writerow([path, rank, label, _class_name(label, classes), f"{value:.6f}"])
    return failed


def _class_name(label: int, classes: Sequence[str] | None) -> str | None:
    """None where the file names no class, or fewer than the model has."""
    return classes[label] if classes is not None and label < len(classes) else None
