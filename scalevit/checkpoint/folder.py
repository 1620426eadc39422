"""Checkpoints on disk: a folder is complete or absent, and damage is found before anything is read from it.

`checkpoints/step-00001234/` holds the ranks' safetensors files, `state.json` (the state of the run) and `manifest.json`
(the SHA-256 of every other file). It is written under a hidden name and renamed when all of it is flushed. `latest`
and `best` name the newest and the best one, for people and scripts; a resumed run looks at the folders themselves.
Knows paths and records, not what a record means.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from scalevit import files
from scalevit.errors import UserError

STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")
# The types of a record's entries; see `Saver.save`.
_RECORD: dict[str, tuple[type, ...]] = {
    "state": (dict,),
    "score": (int, float, type(None)),
    "optimizer": (dict,),
    "loss_scale": (dict,),
    "config": (dict,),
    "data": (dict, type(None)),
    "tensors": (dict,),
    "parts": (list,),
    "tied": (dict,),
    "world_size": (int,),
    "versions": (dict,),
}


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, the oldest first; `find_damage` tells whether they are intact."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def list_resumable(folder: Path) -> list[Path]:
    """Checkpoints, the newest first, with the one that a killed run was about to replace: `clean_up` restores it.

    Raises:
        UserError: there were checkpoints, but none is left.
    """
    replaced = [folder / path.stem.lstrip(".") for path in folder.glob(".step-*.old")]
    found = sorted({*list_checkpoints(folder), *replaced}, reverse=True)
    if not found and ((folder / "latest").exists() or any(folder.glob("damaged-*"))):
        raise UserError(f"{folder}: its checkpoints are damaged or gone; remove {folder.parent} to start again")
    return found


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, or the newest of a run folder or of its `checkpoints`; intact.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = next((c for c in (path, *all_checkpoints(path)[::-1]) if (c / MANIFEST).is_file()), None)
    if found is None:
        raise UserError(f"{path}: contains no checkpoint")
    if problems := find_damage(found):
        raise UserError(f"checkpoint {found}: {problems[0]}")
    return found


def all_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder or of its `checkpoints`, the oldest first."""
    return list_checkpoints(path / "checkpoints") or list_checkpoints(path)


def temporary_path(folder: Path, step: int) -> Path:
    return folder / f".step-{step:08d}.tmp"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def read_record(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says, once its checksum agrees.

    Raises:
        UserError: it is damaged, or of a version of scalevit that writes another format.
    """
    path = checkpoint / STATE
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text())["files"][STATE]["sha256"]
        if files.digest(path).sha256 != expected:
            raise ValueError("wrong SHA-256")
        record = json.loads(path.read_text())
        if record["format"] != FORMAT:
            found = record["format"]
            raise UserError(f"checkpoint {checkpoint}: format {found}, this version of scalevit reads format {FORMAT}")
        for key, types in _RECORD.items():
            if not isinstance(record[key], types):
                raise TypeError(f"{key} is {type(record[key]).__name__}")
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {checkpoint}: {STATE} cannot be read ({_reason(error)})") from None
    return record


# What damaged JSON raises where it is parsed or taken apart.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# --- writing ----------------------------------------------------------------------------------------------


def clean_up(folder: Path) -> None:
    """Removes what an interrupted run left: incomplete and half-removed checkpoints."""
    for replaced in folder.glob(".step-*.old"):
        target = folder / replaced.stem.lstrip(".")
        if not target.exists():
            replaced.rename(target)  # killed before its successor had its name
    for rest in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old"), *folder.glob(".step-*.gone")]:
        shutil.rmtree(rest)


def lock(folder: Path) -> BinaryIO:
    """Locks a folder for one run, until the returned file is closed or this process ends.

    Raises:
        UserError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return files.lock(folder / ".lock", wait=False)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is using it; wait for its end, or choose another name") from None


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as an entry of the manifest.

    Raises:
        OSError: it cannot be read.
    """
    return files.digest(path)._asdict()


def commit(folder: Path, step: int, record: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    """Adds record and manifest to the temporary folder of a step, whose tensors are flushed to disk, and renames it.

    Args:
        digests: of the tensors' files, by name.
    """
    temporary, target = temporary_path(folder, step), checkpoint_path(folder, step)
    (temporary / STATE).write_text(json.dumps({"format": FORMAT, **record}, indent=1) + "\n")
    manifest = {"format": FORMAT, "files": {**digests, STATE: digest(temporary / STATE)}}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (temporary / STATE, temporary / MANIFEST, temporary):
        files.fsync_path(path)
    replaced = folder / f".{target.name}.old"
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    files.fsync_path(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest score, the newer of equal ones; None if none has a score."""
    scored = [(score, path) for path in list_checkpoints(folder) if (score := _score(path)) is not None]
    return max(scored)[1] if scored else None


def update_pointers(folder: Path, *, best: Path | None) -> None:
    """Writes the names of the newest and of the best checkpoint into `latest` and `best`."""
    files.write_whole(folder / "latest", f"{list_checkpoints(folder)[-1].name}\n".encode())
    if best is not None:
        files.write_whole(folder / "best", f"{best.name}\n".encode())
    else:
        (folder / "best").unlink(missing_ok=True)


def prune(folder: Path, kept: Collection[Path]) -> None:
    """Removes all checkpoints but those that are kept."""
    for old in list_checkpoints(folder):
        if old not in kept:
            hidden = folder / f".{old.name}.gone"  # hidden first: half of a checkpoint must not be found
            old.rename(hidden)
            shutil.rmtree(hidden)


def _score(checkpoint: Path) -> float | None:
    try:
        return read_record(checkpoint)["score"]
    except UserError:
        return None  # damage is no reason not to save; it is found when a run would resume from it


# --- reading ----------------------------------------------------------------------------------------------


def find_damage(checkpoint: Path, *, reader: int = 0, readers: int = 1) -> list[str]:
    """The damage of a checkpoint's files; [] if it is intact.

    Args:
        reader: index of the caller among `readers`, each of which computes the checksums of a part of the files.
    """
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
        # NFS keeps removed files that are still open under such names.
        others = [path for path in checkpoint.iterdir() if path.name != MANIFEST and not path.name.startswith(".nfs")]
        found = {path.name: path.stat().st_size for path in others}
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except _UNREADABLE as error:
        return [f"{MANIFEST} cannot be read ({_reason(error)})"]
    problems = [f"{name} is not in the manifest" for name in sorted(found.keys() - expected.keys())]
    problems += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    for number, name in enumerate(sorted(found.keys() & expected.keys())):
        size, sha256 = expected[name]
        if found[name] != size:
            problems.append(f"{name} has {found[name]} bytes instead of {size}")
        elif number % readers == reader:
            try:
                if files.digest(checkpoint / name).sha256 != sha256:
                    problems.append(f"{name} has changed (wrong SHA-256)")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def quarantine(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint so that it is neither resumed from nor counted, but can be looked at."""
    number, target = 1, checkpoint.with_name(f"damaged-{checkpoint.name}")
    while target.exists():
        number, target = number + 1, checkpoint.with_name(f"damaged-{checkpoint.name}-{number + 1}")
    checkpoint.rename(target)
    for pointer in (checkpoint.with_name("latest"), checkpoint.with_name("best")):
        if pointer.is_file() and pointer.read_text().strip() == checkpoint.name:
            pointer.unlink()
    return target
