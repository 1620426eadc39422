"""Finding the label of a sample among its members. Knows bytes and JSON; must not know tars or images.

The first of these that a sample has: `.cls` or `.txt` with an integer in ASCII digits, `.json` with an integer under
a key. A `.txt` beside a `.cls` or a labelled `.json` is taken for a caption.
"""

import json
from collections.abc import Callable, Mapping

EXTENSIONS = ("cls", "json", "txt")
DEFAULT_KEY = "label"
_MOST_DIGITS = 18


class NoLabel(Exception):
    """There is no usable label; the message is the reason."""


def find_label(members: Mapping[str, Callable[[], bytes]], key: str = DEFAULT_KEY) -> int:
    """The label of a sample.

    Args:
        members: those of `EXTENSIONS` that the sample has, with what reads their content.
        key: of the JSON object.

    Raises:
        NoLabel: none there, or not an integer.
    """
    if "cls" in members:
        return _integer(members["cls"](), ".cls")
    reason = f"no .cls, no .json with {key!r} and no .txt member"
    if "json" in members:
        try:
            content = json.loads(members["json"]())
        except ValueError:
            raise NoLabel("the .json member is not JSON") from None
        label = content.get(key) if isinstance(content, dict) else None
        # Not every JSON is about the label: img2dataset puts the address and the size of the image there.
        if isinstance(label, int) and not isinstance(label, bool):
            if abs(label) >= 10**_MOST_DIGITS:
                raise NoLabel(f"the label {str(label)[:20]!r} is not an integer of at most {_MOST_DIGITS} digits")
            return label
        if isinstance(label, str):
            return _integer(label.encode("utf-8", "replace"), f".json under {key!r}")
        if label is not None:
            raise NoLabel(f"the label {str(label)[:20]!r} of .json under {key!r} is not an integer")
    if "txt" in members:
        return _integer(members["txt"](), ".txt")
    raise NoLabel(reason)


def _integer(content: bytes, source: str) -> int:
    text = content[:64].strip()
    digits = text.removeprefix(b"-")
    if len(content) > 64 or not digits.isdigit() or len(digits) > _MOST_DIGITS:
        shown = text[:20].decode("ascii", "replace")
        raise NoLabel(f"the label {shown!r} of {source} is not an integer")
    return int(text)
