"""Finding the label of a sample among its members. Knows bytes and JSON; must not know tars or images.

In this order: `.cls` with an integer in ASCII digits or the name of a class, `.json` with one of these under a key,
`.txt` like `.cls`. A `.txt` beside a `.cls` or a labelled `.json` is treated as a caption.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

EXTENSIONS = ("cls", "json", "txt")
DEFAULT_KEY = "label"
_MAX_DIGITS = 18


class NoLabel(Exception):
    """There is no usable label; the message is the reason."""


@dataclass(frozen=True)
class LabelFormat:
    """How the labels of a set are written."""

    key: str = DEFAULT_KEY
    """Of the label in `.json` members."""
    names: tuple[str, ...] | None = None
    """Of labels 0, 1, ...: labels may be written as names too. None: they are integers."""

    @cached_property
    def _numbers(self) -> dict[str, int] | None:
        return None if self.names is None else {name: number for number, name in enumerate(self.names)}

    def find(self, members: Mapping[str, Callable[[], bytes]]) -> int:
        """The label of a sample.

        Args:
            members: functions that read the members of the sample, by extension; only `EXTENSIONS`.

        Raises:
            NoLabel: there is none, or it is not an integer, or not one of the names.
        """
        if "cls" in members:
            return self._of_text(members["cls"](), ".cls")
        reason = f"no .cls, no .json with {self.key!r} and no .txt member"
        if "json" in members:
            try:
                content = json.loads(members["json"]())
            except ValueError:
                raise NoLabel("the .json member is not JSON") from None
            label = content.get(self.key) if isinstance(content, dict) else None
            # A JSON need not have the label: img2dataset stores the address and the size of the image.
            if label is not None:
                return self._of_json(label)
        if "txt" in members:
            return self._of_text(members["txt"](), ".txt")
        raise NoLabel(reason)

    def _of_json(self, label: Any) -> int:
        source = f".json under {self.key!r}"
        if isinstance(label, str):
            return self._of_text(label.encode("utf-8", "replace"), source)
        if isinstance(label, bool) or not isinstance(label, int):
            raise NoLabel(f"the label {str(label)[:20]!r} of {source} is not an integer")
        if abs(label) >= 10**_MAX_DIGITS:
            raise NoLabel(f"the label {str(label)[:20]!r} is not an integer of at most {_MAX_DIGITS} digits")
        return label

    def _of_text(self, content: bytes, source: str) -> int:
        if self._numbers is None:
            return _integer(content, source)
        name = content[:1000].strip().decode("utf-8", "replace")
        if name in self._numbers:
            return self._numbers[name]
        try:
            return _integer(content, source)
        except NoLabel:
            raise NoLabel(f"the label {name[:20]!r} of {source} is neither a class name nor an integer") from None


INTEGERS = LabelFormat()
"""As our writer writes them."""


def _integer(content: bytes, source: str) -> int:
    text = content[:64].strip()
    digits = text.removeprefix(b"-")
    if len(content) > 64 or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        start = text[:20].decode("ascii", "replace")
        names = "; names need a file of class names" if text else ""
        raise NoLabel(f"the label {start!r} of {source} is not an integer{names}")
    return int(text)
