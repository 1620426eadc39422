"""The wheel: what is in it, and that it works in an empty folder. It is built once, from a source archive."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import scalevit
from launching import ROOT, SECONDS, environment
from scalevit.config.loading import preset_names


def run(arguments: list[str], *, cwd: Path, path: Path | None = None) -> str:
    """Python with these arguments; `path` comes before everything that is installed."""
    changes = {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for name in ("scalevit", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run(["-c", build, "build_sdist", str(folder)], cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(["-c", build, "build_wheel", str(folder)], cwd=unpacked)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_it_has_every_source_file_and_what_they_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    sources = {f"scalevit/{path.relative_to(ROOT / 'scalevit')}" for path in (ROOT / "scalevit").rglob("*.py")}
    sources |= {f"scalevit/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    tables = {f"scalevit/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.json")}
    presets = {f"scalevit/presets/{name}.json" for name in [*preset_names(), "schema"]}
    pages = {"scalevit/reports/page.css", "scalevit/reports/page.js"}
    assert len(tables) >= 7
    assert names == sources | tables | presets | pages | {"scalevit/py.typed"}


def test_its_version_is_the_packages(wheel: Path) -> None:
    assert wheel.name.startswith(f"scalevit-{scalevit.__version__}-")
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        text = file.read(metadata).decode()
        (entries,) = (name for name in file.namelist() if name.endswith("/entry_points.txt"))
        assert "scalevit = scalevit.cli.main:main" in file.read(entries).decode()
    assert f"Version: {scalevit.__version__}\n" in text
    needed = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in needed if "wandb" in line or "matplotlib" in line or "tensorboard" in line]
    assert {"wandb", "tensorboard", "plots", "http", "s3", "gcs", "datasets", "docs", "dev"} <= {
        line.split()[1] for line in text.splitlines() if line.startswith("Provides-Extra:")
    }


def test_quickstart_trains_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    settings = ["train.max_steps=2", "data.workers=0", "model.kwargs.depth=2"]
    run(["-m", "scalevit", "train", "--config", "quickstart", *settings], cwd=tmp_path, path=installed)
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert sorted(os.listdir(tmp_path)) == ["data", "runs"]
    assert list((tmp_path / "data" / "digits" / "train").glob("*.tar"))


def test_the_public_names_work_from_it(installed: Path, tmp_path: Path) -> None:
    program = (
        "import scalevit, sys; assert 'torch' not in sys.modules; print(scalevit.__file__);"
        "model = scalevit.create_model('vit_tiny_patch16_224', 'grouped', depth=2);"
        "print(len(model.blocks), scalevit.Config().name, scalevit.fused_mlp.__name__, scalevit.Trainer.__name__)"
    )
    lines = run(["-c", program], cwd=tmp_path, path=installed).splitlines()
    assert Path(lines[0]).is_relative_to(installed)
    assert lines[1] == "2 run fused_mlp Trainer"


def test_all_public_names_exist() -> None:
    assert set(scalevit.__all__) <= set(dir(scalevit))
    for name in scalevit.__all__:
        assert getattr(scalevit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'create_modell'"):
        _ = scalevit.create_modell
