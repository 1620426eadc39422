"""The published recipes of `configs/recipes`, and the part of docs/recipes.md that is written from their notes.

`python tests/support/recipe_pages.py` writes it again.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != "digits")
IMAGES = 1_281_167
"""Of ImageNet's training set."""
ABOUT = {
    "source": "Source",
    "upstream": "Upstream",
    "upstream_command": "Upstream command",
    "command": "Command",
    "digits": "On the digits",
    "hardware": "Hardware assumed",
    "time": "Cost",
    "top1": "Expected top-1",
    "differences": "Differences from upstream",
}
"""The keys of a recipe's note `about`, with their names on the page."""
page = ROOT / "docs" / "recipes.md"
_GENERATED = re.compile(r"(?<=<!-- from configs/recipes -->\n).*?(?=<!-- end -->)", re.DOTALL)


def about(name: str) -> dict[str, str]:
    """The note of a recipe."""
    notes: dict[str, str] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["about"]
    return notes


def page_of(text: str) -> str:
    """The page with its generated part as it should be."""
    generated = "\n".join(["", *_table(), "", *(line for name in RECIPES for line in _section(name))])
    return _GENERATED.sub(lambda _: generated, text)


def _table() -> list[str]:
    lines = ["| Recipe | Hours on 8 H100, estimate | Expected top-1 |", "|---|---|---|"]
    for name in RECIPES:
        hours = about(name)["time"].split(": ")[1].split(" hours")[0]
        top1 = about(name)["top1"].split(" (")[0].split(";")[0].split(" for ")[0].split(" in the")[0]
        lines.append(f"| [`recipes/{name}`](#{name}) | {hours} | {top1} |")
    return lines


def _section(name: str) -> list[str]:
    notes = about(name)
    lines = [f"### {name}", ""]
    for key, title in ABOUT.items():
        text = f"`{notes[key]}`" if key.endswith("command") and notes[key] != "not stated" else notes[key]
        lines.append(f"- {title}: {f'`{text}`' if key == 'digits' else text}")
    return [*lines, ""]


if __name__ == "__main__":
    page.write_text(page_of(page.read_text(encoding="utf-8")), encoding="utf-8")
