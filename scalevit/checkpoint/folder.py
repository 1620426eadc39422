"""Checkpoints on disk: a folder is there whole or not at all, and damage is found before anything is read from it.

`checkpoints/step-00001234/` holds the ranks' safetensors files, `state.json` (where the run stood) and `manifest.json`
(the SHA-256 of every other file). It is written under a hidden name and renamed when all of it is on the disk. `latest`
and `best` name the newest and the best one, for people and scripts; a resumed run looks at the folders themselves.
"""

import errno
import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from scalevit.errors import UserError
from scalevit.files import fsync_path, write_whole

STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
# What a record says, by key; see `Saver.save`.
_RECORD: dict[str, tuple[type, ...]] = {
    "state": (dict,),
    "score": (int, float, type(None)),
    "optimizer_steps": (int,),
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
    """Checkpoints by step, the oldest first; whether they are undamaged is `find_damage`'s to say."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def list_resumable(folder: Path) -> list[Path]:
    """Those, the newest first, and the one that a killed run was about to replace: `clean_up` will put it back.

    Raises:
        UserError: there were checkpoints, but none is left.
    """
    replaced = [folder / path.stem.lstrip(".") for path in folder.glob(".step-*.old")]
    found = sorted({*list_checkpoints(folder), *replaced}, reverse=True)
    if not found and ((folder / "latest").exists() or any(folder.glob("damaged-*"))):
        raise UserError(f"{folder}: its checkpoints are damaged or gone; remove {folder.parent} to start anew")
    return found


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
        if digest(path)["sha256"] != expected:
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
    """Ends what a killed run had begun: half-written and half-removed checkpoints go."""
    for replaced in folder.glob(".step-*.old"):
        target = folder / replaced.stem.lstrip(".")
        if not target.exists():
            replaced.rename(target)  # killed before its successor had its name
    for rest in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old"), *folder.glob(".step-*.gone")]:
        shutil.rmtree(rest)


def lock(folder: Path) -> BinaryIO:
    """Holds a folder for one run, until the file that is returned is closed or this process ends.

    Raises:
        UserError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("wb")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder}: another run is using it; wait for its end, or choose another name") from None
        # A file system without locks: nobody can hold it.
    return file


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
        fsync_path(path)
    replaced = folder / f".{target.name}.old"
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    fsync_path(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def point_and_prune(folder: Path, *, keep: int, keep_best: bool) -> None:
    """Moves the `latest` and `best` pointers, then removes all checkpoints but the newest `keep` and the best."""
    checkpoints = list_checkpoints(folder)
    scored = [(score, path) for path in checkpoints if (score := _score(path)) is not None]
    best = max(scored)[1] if scored else None
    kept = {*checkpoints[-keep:], *([best] if keep_best and best is not None else [])}
    write_whole(folder / "latest", f"{checkpoints[-1].name}\n".encode())
    if best in kept:
        write_whole(folder / "best", f"{best.name}\n".encode())
    else:
        (folder / "best").unlink(missing_ok=True)
    for old in checkpoints:
        if old not in kept:
            hidden = folder / f".{old.name}.gone"  # first out of sight: half of a checkpoint must not be found
            old.rename(hidden)
            shutil.rmtree(hidden)


def _score(checkpoint: Path) -> float | None:
    try:
        return read_record(checkpoint)["score"]
    except UserError:
        return None  # a damaged one is no reason not to save; it is found when a run would go on from it


# --- reading ----------------------------------------------------------------------------------------------


def find_damage(checkpoint: Path, *, reader: int = 0, readers: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files; [] where all are as they were written.

    Args:
        reader: which of `readers` asks: each computes the checksums of its part of the files.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        # NFS keeps removed files that are still open under such names.
        others = [path for path in checkpoint.iterdir() if path.name != MANIFEST and not path.name.startswith(".nfs")]
        found = {path.name: path.stat().st_size for path in others}
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
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
    for pointer in (checkpoint.with_name("latest"), checkpoint.with_name("best")):
        if pointer.is_file() and pointer.read_text().strip() == checkpoint.name:
            pointer.unlink()
    return target
