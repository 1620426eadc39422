"""Finding the label of a sample among its members. Knows bytes and JSON; must not know tars or images.

In this order: `.cls` with an integer in ASCII digits, `.json` with an integer under a key, `.txt` like `.cls`. A `.txt`
beside a `.cls` or a labelled `.json` is treated as a caption.
"""

import json
from collections.abc import Callable, Mapping

EXTENSIONS = ("cls", "json", "txt")
DEFAULT_KEY = "label"
_MAX_DIGITS = 18


class NoLabel(Exception):
    """There is no usable label; the message is the reason."""


def find_label(members: Mapping[str, Callable[[], bytes]], key: str = DEFAULT_KEY) -> int:
    """The label of a sample.

    Args:
        members: functions that read the members of the sample, by extension; only `EXTENSIONS`.
        key: of the JSON object.

    Raises:
        NoLabel: there is none, or it is not an integer.
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
        # A JSON need not have the label: img2dataset stores the address and the size of the image.
        if isinstance(label, int) and not isinstance(label, bool):
            if abs(label) >= 10**_MAX_DIGITS:
                raise NoLabel(f"the label {str(label)[:20]!r} is not an integer of at most {_MAX_DIGITS} digits")
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
    if len(content) > 64 or not digits.isdigit() or len(digits) > _MAX_DIGITS:
        start = text[:20].decode("ascii", "replace")
        raise NoLabel(f"the label {start!r} of {source} is not an integer")
    return int(text)
