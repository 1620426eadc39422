"""A torch program that asks for more than operations on tensors is refused before anything of it is executed."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import refused
from scalevit.cli.main import main
from scalevit.errors import UserError
from scalevit.export.program_check import check_program
from scalevit.export.torch_program import TorchProgram

Files = dict[str, bytes]
CPU = torch.device("cpu")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trace",)


def pickled() -> bytes:
    content = io.BytesIO()
    torch.save(Attack(), content)
    return content.getvalue()


def graph(change: Callable[[dict[str, Any]], Any]) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        program = json.loads(files["models/model.json"])
        change(program)
        files["models/model.json"] = json.dumps(program).encode()

    return apply


def pickled_weight(files: Files) -> None:
    name = "data/weights/model_weights_config.json"
    config = json.loads(files[name])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    files[name] = json.dumps(config).encode()
    files[f"data/weights/{entry['path_name']}"] = pickled()


def pickled_constant(files: Files) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    files["data/constants/model_constants_config.json"] = json.dumps({"config": {"x": entry}}).encode()
    files["data/constants/opaque_obj_0"] = pickle.dumps(Attack())


def first_node(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["graph"]["nodes"][0]


def symbol(program: dict[str, Any]) -> None:
    values = program["graph_module"]["graph"]["sym_int_values"].values()
    next(iter(values))["as_expr"]["expr_str"] = "__import__('os').mkdir('trace')"


def container(program: dict[str, Any]) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["out_spec"] = json.dumps([1, {"type": "os.path", "context": "null", "children_spec": []}])


ATTACKS: dict[str, tuple[Callable[[Files], None], str]] = {
    "pickled weight": (pickled_weight, "cls_token"),
    "pickled constant": (pickled_constant, "data/constants/opaque_obj_0"),
    "pickled sample": (
        lambda files: files.update({"data/sample_inputs/model.pt": pickled()}),
        "sample_inputs/model.pt",
    ),
    "compiled code": (lambda files: files.update({"data/aotinductor/model/x.so": b""}), "data/aotinductor/model/x.so"),
    "old form": (lambda files: files.update({"data/weights/model.pt": pickled()}), "data/weights/model.pt"),
    "function": (graph(lambda content: first_node(content).update(target="torch.os.mkdir")), "torch.os.mkdir"),
    "file": (
        graph(lambda content: first_node(content).update(target="torch.ops.aten.from_file.default")),
        "torch.ops.aten.from_file.default",
    ),
    "symbol": (graph(symbol), "__import__('os').mkdir('trace')"),
    "guard": (graph(lambda content: content.update(guards_code=["1"])), "guards_code"),
    "node's origin": (graph(lambda content: first_node(content)["metadata"].update(torch_fn="a;b")), "metadata"),
    "container": (graph(container), "os.path"),
}


@pytest.fixture(scope="module")
def program(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("program") / "grouped.pt2"
    main(["export", str(runs / "grouped"), str(target), "--to", "torch"])
    return target


def rewritten(source: Path, target: Path, change: Callable[[Files], None]) -> None:
    with zipfile.ZipFile(source) as archive:
        names = archive.namelist()
        root = names[0].partition("/")[0]
        files = {name.removeprefix(f"{root}/"): archive.read(name) for name in names}
    change(files)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{root}/{name}", content)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_executed(
    attack: str, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    change, named = ATTACKS[attack]
    rewritten(program, Path("x.pt2"), change)
    Path("a.png").touch()
    message = refused(capsys, "predict", "x.pt2", "a.png")
    assert message.startswith("error: export x.pt2: contains more than tensors and operations and was not loaded (")
    assert named in message
    assert not Path("trace").exists()


def test_the_attacks_are_of_files_that_are_read_otherwise(program: Path, tmp_path: Path) -> None:
    rewritten(program, tmp_path / "x.pt2", lambda files: None)
    read = TorchProgram().read(tmp_path / "x.pt2", CPU)
    assert read.logits(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x05\x06" + bytes(18)])
def test_damaged_files_are_one_line(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    for name in ("x.pt2", "x.onnx") if find_spec("onnxruntime") else ("x.pt2",):
        Path(name).write_bytes(content)
        assert refused(capsys, "predict", name, "a.png").startswith(f"error: export {name}: cannot be read (")


def test_an_archive_with_two_directories_is_refused(program: Path, tmp_path: Path) -> None:
    """zipfile takes the directory right before the end record, torch's reader the one that the record points to."""
    with zipfile.ZipFile(program) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    seen_by_torch, directory = _records(files, start=0)
    hidden, other = _records({"model/serialized_state_dict.pt": pickled()}, start=len(seen_by_torch))
    size = max(len(directory), len(other)) + 10
    # The second directory is padded by its last comment, and its offsets count from where zipfile believes to begin.
    hidden, other = _records(
        {"model/serialized_state_dict.pt": pickled()},
        start=len(seen_by_torch),
        shift=-size,
        comment=b"c" * (size - len(other)),
    )
    body = seen_by_torch + hidden
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(files), len(files), size, len(body), 0)
    content = body + directory.ljust(size, b"\0") + other + end
    with pytest.raises(UserError, match="was not loaded"):
        check_program(tmp_path / "two.pt2", content)


def _records(files: Files, *, start: int, shift: int = 0, comment: bytes = b"") -> tuple[bytes, bytes]:
    """Files of a zip archive and their directory; `comment` belongs to the last of them."""
    local = directory = b""
    for number, (name, content) in enumerate(files.items(), 1):
        sizes = (zlib.crc32(content), len(content), len(content), len(name))
        own = comment if number == len(files) else b""
        place = start + len(local) + shift
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, *sizes, 0, len(own), 0, 0, 0, place)
        directory += name.encode() + own
        local += struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, *sizes, 0) + name.encode() + content
    return local, directory
