"""Checkpoints on disk: a folder is there whole or not at all, and damage is found before anything is read from it.

`checkpoints/step-00001234/` holds the ranks' safetensors files, `state.json` (where the run stood) and `manifest.json`
(the SHA-256 of every other file). It is written under a hidden name and renamed when all of it is on the disk. `latest`
and `best` name the newest and the best one, for people and scripts; a resumed run looks at the folders themselves.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalevit.errors import UserError

STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 1


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, the oldest first; whether they are undamaged is `find_damage`'s to say."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def temporary_path(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.tmp"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says.

    Raises:
        UserError: it is damaged, or of a version of scalevit that writes another format.
    """
    try:
        record = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint}: {STATE} cannot be read ({error})") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise UserError(f"checkpoint {checkpoint}: format {found}, this version of scalevit reads format {FORMAT}")
    return record


# --- writing ----------------------------------------------------------------------------------------------


def clean_up(folder: Path) -> None:
    """Ends what a killed run had begun: half-written and half-removed checkpoints go."""
    for replaced in folder.glob(".step-*.old"):
        target = folder / replaced.stem.lstrip(".")
        if not target.exists():
            replaced.rename(target)  # killed before its successor had its name
    for rest in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old"), *folder.glob(".step-*.gone")]:
        shutil.rmtree(rest)


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        return {"bytes": file.tell(), "sha256": sha256.hexdigest()}


def _digest(file: Any) -> Any:  # Python 3.10
    sha256 = hashlib.sha256()
    while block := file.read(1 << 20):
        sha256.update(block)
    return sha256


def commit(folder: Path, step: int, record: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    """Gives the temporary folder of a step, whose tensors are on the disk, its record, its manifest and its name.

    Args:
        digests: of the tensors' files, by name.
    """
    temporary, target = temporary_path(folder, step), checkpoint_path(folder, step)
    (temporary / STATE).write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n")
    manifest = {"format": FORMAT, "files": {**digests, STATE: digest(temporary / STATE)}}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (temporary / STATE, temporary / MANIFEST, temporary):
        _flush(path)
    replaced = folder / f".{target.name}.old"
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def point_and_prune(folder: Path, *, keep: int, keep_best: bool) -> None:
    """Moves the `latest` and `best` pointers, then removes all checkpoints but the newest `keep` and the best."""
    checkpoints = list_checkpoints(folder)
    scored = [(score, path) for path in checkpoints if (score := read_record(path)["score"]) is not None]
    best = max(scored)[1] if scored else None
    _point(folder / "latest", checkpoints[-1].name)
    if best is not None:
        _point(folder / "best", best.name)
    for old in checkpoints[:-keep]:
        if not (keep_best and old == best):
            hidden = folder / f".{old.name}.gone"  # first out of sight: half of a checkpoint must not be found
            old.rename(hidden)
            shutil.rmtree(hidden)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f".{pointer.name}.tmp")
    temporary.write_text(name + "\n")
    _flush(temporary)
    os.replace(temporary, pointer)
    _flush(pointer.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------


def find_damage(checkpoint: Path, *, reader: int = 0, readers: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files; [] where all are as they were written.

    Args:
        reader: which of `readers` asks: each computes the checksums of its part of the files.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        found = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MANIFEST}
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    problems = [f"{name} is not in the manifest" for name in sorted(found.keys() - expected.keys())]
    problems += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    for number, name in enumerate(sorted(found.keys() & expected.keys())):
        size, sha256 = expected[name]
        if found[name] != size:
            problems.append(f"{name} has {found[name]} bytes instead of {size}")
        elif number % readers == reader:
            try:
                if digest(checkpoint / name)["sha256"] != sha256:
                    problems.append(f"{name} has changed (wrong SHA-256)")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint so that it is neither resumed from nor counted, but can be looked at."""
    number, target = 1, checkpoint.with_name(f"damaged-{checkpoint.name}")
    while target.exists():
        number, target = number + 1, checkpoint.with_name(f"damaged-{checkpoint.name}-{number + 1}")
    checkpoint.rename(target)
    return target
