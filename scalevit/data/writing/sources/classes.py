"""How the class names of a source become labels 0, 1, ...: sorted, or as a file says. Knows names and text files."""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scalevit.errors import UserError, nearest_hint

ClassOrder = Literal["torchvision", "natural"]
"""How class names are sorted before they are numbered: torchvision's ImageFolder compares them as text ("0", "1", "10",
"2"), timm's readers compare numbers in them as numbers ("0", "1", "2", "10") and ignore case."""

_INTEGER = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class ClassSettings:
    """How classes are named and numbered."""

    order: ClassOrder = "torchvision"
    names: Sequence[str] | None = None
    """Of labels 0, 1, ...; None: the names that are found, in `order`."""
    renamed: Mapping[str, str] | None = None
    """Class by the name that the source has for it; several may be one class. Classes are in the order of the source's
    names. None: the source's names."""

    def numbered(self, found: Iterable[str]) -> tuple[list[str], dict[str, int]]:
        """Numbers the names of a source.

        Returns:
            The classes in the order of their labels, and the label of each name that was found.

        Raises:
            UserError: a name is not in the label map, or a class not among the class names.
        """
        classes_of = {name: self._class_of(name) for name in sorted_classes(found, self.order)}
        classes = list(dict.fromkeys(classes_of.values())) if self.names is None else list(self.names)
        numbers = {name: number for number, name in enumerate(classes)}
        for name in classes_of.values():
            if name not in numbers:
                raise UserError(f"class {name!r} is not in the file of class names{nearest_hint(name, classes)}")
        return classes, {name: numbers[own] for name, own in classes_of.items()}

    def labelled(self, values: Sequence[str]) -> tuple[list[str] | None, list[int]]:
        """Labels of samples whose classes are written as integers or as names, e.g. in a column of a table.

        Integers are the labels themselves, and `names` their names; unless a label map is given, or they are names.

        Returns:
            The classes in the order of their labels (None: integers without names), and the label of each sample.

        Raises:
            UserError: as `numbered`, or an integer has no name.
        """
        numbers = self.renamed is None and all(_INTEGER.fullmatch(value) for value in values)
        if numbers and (self.names is None or not set(values) <= set(self.names)):
            labels = [int(value) for value in values]
            for label in labels:
                if self.names is not None and not 0 <= label < len(self.names):
                    raise UserError(f"label {label} has no name: the file of class names has {len(self.names)} lines")
            return (None if self.names is None else list(self.names)), labels
        integers = sum(1 for value in values if _INTEGER.fullmatch(value))
        if self.names is None and self.renamed is None and 2 * integers > len(values):
            odd = next(value for value in values if not _INTEGER.fullmatch(value))
            raise UserError(
                f"labels are integers, but not {odd!r} ({len(values) - integers} of {len(values)}): correct it, or "
                "name all classes by a file of class names"
            )
        classes, label_of = self.numbered(values)
        return classes, [label_of[value] for value in values]

    def _class_of(self, name: str) -> str:
        if self.renamed is None:
            return name
        if name not in self.renamed:
            raise UserError(f"class {name!r} is not in the label map{nearest_hint(name, self.renamed)}")
        return self.renamed[name]


def sorted_classes(names: Iterable[str], order: ClassOrder) -> list[str]:
    """Distinct class names in the order of their labels 0.."""
    distinct = sorted(set(names))
    return distinct if order == "torchvision" else sorted(distinct, key=_natural_key)


def _natural_key(name: str) -> list[str | int]:
    """timm's `natural_key`, without importing torch."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """The class names in a file, one per line or a JSON list, in the order of their labels.

    Raises:
        UserError: it cannot be read, is empty, or has a name twice.
    """
    text = _read(path)
    try:
        names = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines()]
    except ValueError:
        raise UserError(f"class names {path}: is not a list in JSON") from None
    while names and names[-1] == "":
        names.pop()
    seen: set[str] = set()
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name or name in seen:
            raise UserError(f"class names {path}: label {number} is {name!r}; every name must be text, once")
        seen.add(name)
    if not names:
        raise UserError(f"class names {path}: is empty")
    return names


def read_label_map(path: str | os.PathLike[str]) -> dict[str, str]:
    """Class by the source's name: a JSON object, or lines of two columns with a comma, a tab or a space between them.

    ImageNet's LOC_synset_mapping.txt ("n01440764 tench, Tinca tinca") is such a file.

    Raises:
        UserError: it cannot be read, a line has one column, or a name has two classes.
    """
    text = _read(path)
    if text.lstrip().startswith("{"):
        try:
            pairs = list(json.loads(text).items())
        except ValueError:
            raise UserError(f"label map {path}: is not an object in JSON") from None
        for name, value in pairs:
            if not isinstance(value, str):
                raise UserError(f"label map {path}: the class of {name!r} must be text, not {json.dumps(value)[:40]}")
    else:
        pairs = [_two_columns(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    found: dict[str, str] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise UserError(f"label map {path}: {name!r} is both {found[name]!r} and {value!r}")
    return found


def read_class_map(path: str | os.PathLike[str]) -> dict[str, int]:
    """Label by class, or by old label as text: a JSON object.

    Raises:
        UserError: it cannot be read or is not such an object.
    """
    try:
        labels = json.loads(_read(path))
    except ValueError:
        labels = None
    if not isinstance(labels, dict) or not labels:
        raise UserError(f"class map {path}: is not an object in JSON (a list of names is a file of class names)")
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise UserError(
                f"class map {path}: the label of {name!r} must be an integer from 0, not {json.dumps(label)}"
            )
    return labels


def _two_columns(line: str, number: int, path: str | os.PathLike[str]) -> tuple[str, str]:
    separator = min((mark for mark in ("\t", ",", " ") if mark in line), key=line.index, default=None)
    name, value = ("", "") if separator is None else line.split(separator, 1)
    if separator == "," and value.lstrip().startswith('"'):
        value = next(csv.reader([value.strip()]))[0]
    if not name.strip() or not value.strip():
        raise UserError(f"label map {path}, line {number}: must be two columns, a name and its class")
    return name.strip(), value.strip()


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
