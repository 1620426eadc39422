"""`scalevit export` in every form, for every reduction; read by the tools that the forms are for, without scalevit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from commands import refused
from launching import ROOT, environment
from scalevit.cli.main import main
from scalevit.errors import UserError
from scalevit.export.classifier import open_classifier
from scalevit.export.source import find_source
from scalevit.export.trained_model import read_model
from trained_runs import CLASSES, STRATEGIES, write_exports

PROGRAM = """
import runpy, sys
paths, blocked, script, *sys.argv[1:] = sys.argv[1].split(":"), sys.argv[2].split(","), *sys.argv[3:]
sys.path += paths
sys.modules.update(dict.fromkeys(blocked))  # an import of them fails
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def exports(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    with_onnx = find_spec("onnxscript") is not None
    for strategy in STRATEGIES:
        write_exports(runs / strategy, folder, with_onnx=with_onnx)
    write_exports(runs / "grouped", folder, with_onnx=with_onnx, width=0.5)
    return folder


def without_scalevit(tool: str, folder: Path, packages: tuple[str, ...], blocked: str) -> dict[str, float]:
    """Runs `foreign_tools.py` in an interpreter that cannot import the blocked packages."""
    specs = [find_spec(package) for package in packages]
    paths = ":".join(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))
    script = ROOT / "tests" / "support" / "foreign_tools.py"
    command = [sys.executable, "-I", "-c", PROGRAM, paths, blocked, str(script), tool, str(folder)]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_timm_and_torch_give_the_same_logits(exports: Path) -> None:
    differences = without_scalevit("timm", exports, ("timm", "torch", "numpy", "safetensors"), "scalevit")
    assert len(differences) == (len(STRATEGIES) + 1) * 2 * 5


def test_onnxruntime_gives_the_same_logits(exports: Path) -> None:
    pytest.importorskip("onnxscript")
    differences = without_scalevit("onnx", exports, ("onnxruntime", "numpy"), "scalevit,torch,timm")
    assert len(differences) == (len(STRATEGIES) + 1) * 2


def test_the_file_for_timm_is_untied_unless_asked(exports: Path) -> None:
    untied, tied = (load_file(exports / f"grouped{suffix}") for suffix in (".safetensors", ".tied.safetensors"))
    shared = {name for name in untied if name.startswith("blocks.1.mlp.")}
    assert len(shared) == 4
    assert untied.keys() - tied.keys() == shared
    for name in shared:
        assert torch.equal(untied[name], untied[name.replace("blocks.1", "blocks.0")])


@pytest.mark.parametrize(("strategy", "hidden"), [("shallow", 16), ("thin", 49), ("grouped_cut", 73)])
def test_timm_builds_exactly_the_hidden_width(exports: Path, strategy: str, hidden: int) -> None:
    config = json.loads((exports / f"{strategy}.json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"])
    assert {block.mlp.fc1.out_features for block in model.blocks} == {hidden}


def test_the_printed_lines_load_the_export(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = read_model(find_source(str(runs / "grouped")))[0](images)
    for target, options in {
        "a.safetensors": ["timm"],
        "b.safetensors": ["timm", "--tied"],
        "c": ["huggingface"],
    }.items():
        main(["export", str(runs / "grouped"), target, "--to", *options])
        first, *lines = capsys.readouterr().out.splitlines()
        assert first.startswith(
            f"wrote {target}: {runs}/grouped/best.safetensors; largest difference of a logit, read back: 0"
        )
        scope: dict[str, object] = {}
        exec("\n".join(["import timm, safetensors.torch", *lines]), scope)
        model = scope["model"]
        assert isinstance(model, torch.nn.Module)
        assert torch.allclose(model.eval()(images), expected, atol=1e-5)
        assert (model.blocks[0].mlp is model.blocks[1].mlp) == ("--tied" in options)


def test_the_folder_says_what_the_model_expects(exports: Path) -> None:
    folder = exports / "grouped.hf"
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == CLASSES
    assert (config["num_classes"], config["num_features"], config["global_pool"]) == (5, 49, "token")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, 16, 16), "bicubic", 0.8)
    assert (tuple(data["mean"]), tuple(data["std"])) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "cat, dog, owl, elk, bee" in card


def test_no_license_is_invented(exports: Path) -> None:
    """timm knows one of its own pretrained weights of this name (apache-2.0), which these are not."""
    for path in (
        exports / "grouped.hf" / "config.json",
        exports / "grouped.hf" / "README.md",
        exports / "grouped.json",
    ):
        assert "license" not in path.read_text().lower(), path
    assert timm.get_pretrained_cfg("vit_tiny_patch16_224").license == "apache-2.0"


def test_what_is_written_is_readable_by_all_and_nothing_is_left_over(exports: Path) -> None:
    assert [path for path in exports.rglob("*") if path.name.startswith(".")] == []
    (exports / "probe").touch()
    mode = (exports / "probe").stat().st_mode
    assert (
        (exports / "grouped.safetensors").stat().st_mode
        == (exports / "grouped.hf" / "model.safetensors").stat().st_mode
        == mode
    )


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.makedirs, (str(self._path), 0o755, True)


def test_nothing_in_a_folder_is_executed(exports: Path, tmp_path: Path) -> None:
    """timm reads pytorch_model.bin, and its own message advises to turn the check off."""
    folder, target = tmp_path / "malicious", tmp_path / "executed"
    folder.mkdir()
    (folder / "config.json").write_bytes((exports / "grouped.hf" / "config.json").read_bytes())
    state = load_file(exports / "grouped.hf" / "model.safetensors")
    torch.save({"state_dict": state, "hook": Payload(target)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        open_classifier(find_source(str(folder)))
    reason = "it is damaged, or contains more than tensors: save model.state_dict()"
    assert str(error.value) == f"export {folder}: cannot be read ({reason})"
    assert not target.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert target.exists(), "the payload works where it is executed"


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["RUNS/grouped", "there.safetensors", "--to", "timm"],
            "there.safetensors: already exists; choose another name",
        ),
        (["RUNS/grouped", "beside.safetensors", "--to", "timm"], "beside.json: already exists"),
        (["RUNS/grouped", "x.pth", "--to", "timm"], "x.pth: --to timm writes a .safetensors file: name it so"),
        (["nowhere", "x" * 250 + ".pt2", "--to", "torch"], "x.pt2: cannot be written (File name too long)"),
        (["RUNS/grouped", "no/x.pt2", "--to", "torch"], "no: no such folder"),
        (["RUNS/grouped", "x.pt2", "--to", "torch", "--tied"], "--tied applies to --to timm, not to --to torch"),
        (["RUNS/grouped", "x.pt2", "--to", "torch", "--weights", "ema"], "has none of best_ema.safetensors, final_ema"),
        (
            ["RUNS/grouped/best.safetensors", "x.pt2", "--to", "torch", "--weights", "ema"],
            "--weights applies to runs and",
        ),
        (["RUNS", "x.pt2", "--to", "torch"], "has none of best_ema.safetensors"),
        (
            ["RUNS/grouped", "x.pt2", "--to", "torch", "--width", "2"],
            "--width 2: must leave hidden units, and be at most 1",
        ),
        (["EXPORTS/grouped.pt2", "x.pt2", "--to", "torch"], "grouped.pt2: is an export (--to torch): name the run"),
        (["RUNS/grouped", "x.bin", "--to", "tim"], "invalid choice: 'tim'"),
        (["plain.safetensors", "x.pt2", "--to", "torch"], "plain.safetensors: there is no config.json beside it"),
    ],
)
def test_mistakes_are_one_line(
    runs: Path,
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there.safetensors", "beside.json", "plain.safetensors"):
        Path(name).touch()
    given = [argument.replace("RUNS", str(runs)).replace("EXPORTS", str(exports)) for argument in arguments]
    assert message in refused(capsys, "export", *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside.json", "plain.safetensors", "there.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 12}, "ValueError: its model has 5 classes, but num_classes = 12"),
        ({"model_args": {"num_classes": 12}}, "ValueError: its model has 12 classes, but num_classes = 5"),
        ({"label_names": ["cat", "dog"]}, "ValueError: has names of 2 classes, but num_classes = 5"),
        ({"label_names": {"0": "cat", "7": "dog"}}, "ValueError: has names of 8 classes, but num_classes = 5"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "std = [0.0, 0.0, 0.0]: must be finite, and std above 0"),
        ({"pretrained_cfg": {"mean": [0, 0, float("inf")]}}, "ValueError: mean = [0.0, 0.0, inf], std = "),
        ({"model_args": {"img_size": 32}}, "AssertionError: Input height (16) doesn't match model (32)"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32]}}, "AssertionError: Input height (32) doesn't match model (16)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["huggingface", "timm"])
def test_a_config_that_does_not_fit_the_weights_is_refused(
    form: str, changes: dict[str, Any], message: str, exports: Path, tmp_path: Path
) -> None:
    """timm would drop the classifier without a word, and resample position embeddings."""
    if form == "huggingface":
        export, config = tmp_path / "x", tmp_path / "x" / "config.json"
        shutil.copytree(exports / "shallow.hf", export)
    else:
        export, config = tmp_path / "x.safetensors", tmp_path / "x.json"
        for path in (export, config):
            shutil.copy(exports / f"shallow{path.suffix}", path)
    content = json.loads(config.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if key in ("model_args", "pretrained_cfg") else value
    config.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        open_classifier(find_source(str(export)))
    assert str(error.value).startswith(f"export {export}: cannot be read (")
    assert "\n" not in str(error.value)
    if form == "timm" and "model_args" in changes:  # of a file, timm refuses other shapes itself
        message = "size mismatch for "
    assert message in str(error.value)
