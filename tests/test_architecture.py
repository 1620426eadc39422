"""The rooms' contracts and habits hold in this checkout, and the checker finds what breaks them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import architecture
from architecture import RULES, Sources
from config_keys import config_keys


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_violations(rule, sources: Sources) -> None:
    assert rule(sources) == []


def test_rooms_name_no_config_keys(sources: Sources) -> None:
    assert architecture.config_keys_in_rooms(sources, config_keys()) == []


def test_every_room_of_the_checkout_has_its_place(sources: Sources) -> None:
    rooms = {module.room for module in sources.modules.values()}
    assert rooms <= {"", *architecture.LEVEL, *architecture.LEAVES}
    assert len(sources.parts) >= 9, "reductions, engines, losses, tasks and trackers are found"


@pytest.mark.parametrize("module", ["scalevit", "scalevit.config.tree", "scalevit.config.loading", "scalevit.cli.main"])
def test_importing_it_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'deepspeed')))"
    environment = {**os.environ, "PYTHONPATH": str(architecture.ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


# --- the checker itself -----------------------------------------------------------------------------------

CLEAN = {
    "scalevit/__init__.py": "",
    "scalevit/errors.py": "",
    "scalevit/config/base.py": "class Part: ...",
    "scalevit/config/tree.py": "from scalevit.runs.trackers import TRACKERS",
    "scalevit/runs/trackers/base.py": "from scalevit.config.base import Part\nclass Tracker(Part): ...",
    "scalevit/runs/trackers/file.py": "from scalevit.runs.trackers.base import Tracker\nclass File(Tracker): ...",
    "scalevit/runs/trackers/__init__.py": "from scalevit.runs.trackers.file import File\nTRACKERS = (File,)",
    "scalevit/models/build.py": "from scalevit.errors import UserError\nfrom scalevit.kernels import mlp",
    "kernels/__init__.py": "from .mlp import mlp",
    "kernels/mlp.py": "import torch",
    "launch/train.py": "from scalevit.models import build",
    "tests/test_models.py": "",
}


def write(folder: Path, files: dict[str, str]) -> Sources:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Sources(folder)


def test_a_clean_tree_has_no_violations(tmp_path: Path) -> None:
    sources = write(tmp_path, CLEAN)
    assert {rule.__name__: rule(sources) for rule in RULES} == {rule.__name__: [] for rule in RULES}
    assert architecture.config_keys_in_rooms(sources, ["train.epochs"]) == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "part"),
    [
        ("wrong_directions", "scalevit/data/x.py", "from scalevit.models import build", "data imports"),
        ("wrong_directions", "scalevit/data/x.py", "def f():\n    import scalevit.models.build", "x.py:2"),
        ("wrong_directions", "scalevit/errors.py", "import scalevit.models.build", "errors imports"),
        ("wrong_directions", "scalevit/runs/x.py", "from scalevit.config.tree import Config", "runs imports"),
        ("wrong_directions", "kernels/x.py", "from scalevit.models import build", "kernels imports"),
        ("wrong_directions_inside", "scalevit/data/storage/x.py", "import scalevit.data.shards.y", "data.storage"),
        ("wrong_directions_inside", "scalevit/engines/fsdp/x.py", "import scalevit.engines.deepspeed.y", "fsdp"),
        ("heavy_parts", "scalevit/runs/trackers/file.py", "import torch\nclass File(Tracker): ...", "torch"),
        (
            "heavy_parts",
            "scalevit/runs/trackers/file.py",
            "from scalevit.models import build\nclass File(Tracker): ...",
            "scalevit.models.build",
        ),
        ("named_parts", "scalevit/models/x.py", "from scalevit.runs.trackers.file import File", "x.py:1"),
        (
            "named_parts",
            "scalevit/runs/tracking.py",
            "def f():\n    import scalevit.runs.trackers.file",
            "tracking.py:2",
        ),
        ("named_parts", "scalevit/runs/trackers/x.py", "from scalevit.runs.trackers import file", "trackers.file"),
        ("named_parts", "scalevit/models/x.py", "from scalevit.runs.trackers import TRACKERS, File", "trackers.file"),
        ("torch_where_it_must_not_be", "scalevit/runs/x.py", "def f():\n    from torch import nn", "x.py:2"),
        (
            "circles",
            "scalevit/errors.py",
            "def f():\n    from scalevit.models import build",
            "errors <-> scalevit.models",
        ),
        ("circles", "kernels/mlp.py", "from . import mlp, x", ""),
        ("too_long", "tests/test_models.py", "\n" * 401, "401 lines"),
        ("too_long", "scalevit/models/x.py", "def f():\n" + "    a = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_the_checker_finds(rule: str, file: str, text: str, part: str, tmp_path: Path) -> None:
    extra = {
        "scalevit/data/shards/y.py": "",
        "scalevit/engines/deepspeed/y.py": "",
        "kernels/x.py": "from .mlp import mlp",
    }
    found = getattr(architecture, rule)(write(tmp_path, {**CLEAN, **extra, file: text}))
    assert len(found) == 1, found
    assert part in found[0]


def test_the_checker_finds_config_keys_in_texts_only(tmp_path: Path) -> None:
    text = '"""train.epochs in a docstring"""\nx = f"train.epochs = {1}"\ny = "train.epochs_more, my/train.epochs"\n'
    sources = write(tmp_path, {**CLEAN, "scalevit/data/x.py": text, "scalevit/cli/y.py": text})
    found = architecture.config_keys_in_rooms(sources, ["train.epochs", "train"])
    assert found == ["scalevit/data/x.py:2: names the config key train.epochs"]
