"""`scalevit reduce` and `scalevit analyze` as a user calls them, on a run folder with digits."""

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from commands import refused
from scalevit.analysis.reducing import load_trained
from scalevit.cli.fit_arguments import trained_config
from scalevit.cli.main import main
from scalevit.cli.reduce import overrides_of
from scalevit.config.loading import load_config
from scalevit.data.builtin import digits
from scalevit.data.writing.writer import write_samples
from scalevit.models.build import build_model
from scalevit.models.weights.match import Coverage
from scalevit.models.weights.read import read_classes, read_weights
from scalevit.models.weights.write import write_weights
from scalevit.training.run import prepare
from scalevit.tying import canonical_state

SETTINGS = {
    "reduction": {"strategy": "none"},
    "model": {"kwargs": {"depth": 4, "embed_dim": 24}},
    "engine": {"name": "deepspeed"},  # the default; a second one in a process fails, so `reduce` must start none
    "kernels": {"mlp": "eager"},
}
CLASSES = [str(digit) for digit in range(10)]
FEW = ["--images", "16"]
PAIRS, BLOCKS = ["--choose-pairs", "1"], ["--choose-blocks", "1"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder `run` with weights, and one `bare` whose config names shards that do not exist."""
    folder = tmp_path_factory.mktemp("reduce")
    for part, samples in digits().items():
        write_samples(samples[:48], folder / part, shard_size=48, classes=CLASSES)
    data = {"workers": 0, "builtin": None, "train": str(folder / "train"), "validation": str(folder / "validation")}
    for name, own in (("run", data), ("bare", {**data, "train": "nowhere", "validation": "nowhere"})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"extends": "quickstart", **SETTINGS, "data": own}))
        config = load_config(folder / name / "config.json", [])
        model = build_model(config.model, config.reduction, seed=0)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        write_weights(
            folder / name / "final.safetensors",
            canonical_state(model),
            model=config.model,
            reduction=config.reduction,
            tied={},
            classes=CLASSES,
        )
    return folder


@pytest.fixture(autouse=True)
def _inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


def reduced(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, list[str]]:
    """What the command prints, and the settings that it names for training."""
    Path(arguments[arguments.index("--to") + 1]).unlink(missing_ok=True)
    main(["reduce", *arguments])
    output = capsys.readouterr().out
    return output, shlex.split(output.splitlines()[-1])


def parameters(path: str) -> int:
    return sum(tensor.numel() for tensor in read_weights(Path(path)).tensors.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ["reduction.strategy=grouped"],
        ["reduction.strategy=grouped", "reduction.groups=[[0, 1, 3]]", "--shared", "first", "--no-refit"],
        ["reduction.strategy=grouped", "reduction.keep=0.5"],
        ["reduction.strategy=shallow", "reduction.keep=0.25", "--units", "weights"],
        ["reduction.strategy=shallow", "--choose-blocks", "2", "--no-refit", "--units", "first"],
        ["reduction.strategy=grouped", "--choose-pairs", "2", "--no-refit"],
        ["reduction.strategy=thin", "reduction.mlp_ratio=1.5"],
    ],
    ids=" ".join,
)
def test_training_takes_the_file_as_it_is(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output, settings = reduced(capsys, "run", "--to", "out.safetensors", *FEW, *arguments)
    config = load_config("run", settings)
    found: list[Coverage] = []
    model = build_model(config.model, config.reduction, seed=3, on_weights=found.append, need_classifier=True)
    assert found[0].already_reduced, "or it would be reduced a second time"
    weights = read_weights(Path("out.safetensors"))
    assert weights.tensors.keys() == canonical_state(model).keys()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in canonical_state(model).items())
    assert read_classes(Path("out.safetensors")) == tuple(CLASSES)
    counts = [parameters("run/final.safetensors"), parameters("out.safetensors")]
    assert counts[1] < counts[0]
    assert all(f"{count:,}" in output for count in counts)
    assert "top1" in output


def test_a_run_starts_from_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    _, settings = reduced(capsys, "run", "--to", "start.safetensors", "reduction.strategy=grouped", "--no-refit")
    probe = [
        "name=probe",
        "engine.name=fsdp",  # DeepSpeed's starts once in a process
        "optimizer.frozen=backbone",
        "train.epochs=1",
        "schedule.warmup_epochs=0",
        "ema.enabled=false",
    ]
    prepare(load_config("run", [*settings, *probe, "train.max_steps=2", "train.global_batch=32"])).train()
    before, after = (
        read_weights(path).tensors for path in (Path("start.safetensors"), Path("runs/probe/final.safetensors"))
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("first", "second", "made"),
    [
        (["strategy=shallow", "keep=0.25"], ["strategy=grouped"], {"strategy": "grouped", "keep": 0.25}),
        (["strategy=grouped"], ["strategy=shallow"], {"strategy": "grouped", "keep": 0.5}),
        (["strategy=grouped", "groups=[[1,2]]"], ["strategy=thin"], {"strategy": "grouped", "keep": 0.5}),
    ],
    ids=str,
)
def test_what_the_weights_are_is_kept(
    first: list[str], second: list[str], made: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second reduction names one axis only."""
    quick = ["--no-refit", "--units", "first"]
    settings = [[f"reduction.{each}" for each in reduction] for reduction in (first, second)]
    reduced(capsys, "run", "--to", "one.safetensors", *quick, *settings[0])
    output, printed = reduced(
        capsys, "one.safetensors", "--config", "run", "--to", "two.safetensors", *quick, *settings[1]
    )
    found = read_weights(Path("two.safetensors")).reduction
    assert found is not None
    assert made.items() <= found.model_dump().items()
    assert output.startswith(f'the weights are {{"strategy": "{first[0].removeprefix("strategy=")}"')
    assert ', which is kept: reduced to {"strategy": "grouped"' in output.splitlines()[0]
    assert load_config("run", printed).reduction.structure(4) == found.structure(4)
    assert parameters("two.safetensors") < parameters("one.safetensors")


def test_reductions_that_none_combines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--no-refit", "--units", "first"]
    reduced(capsys, "run", "--to", "one.safetensors", *quick, "reduction.strategy=grouped")
    some = ["reduction.strategy=shallow", "reduction.blocks=[0]"]
    message = refused(capsys, "reduce", "one.safetensors", "--config", "run", "--to", "new.safetensors", *quick, *some)
    assert (
        'config: reduction.strategy = "shallow": cannot be combined with {"strategy": "grouped"}, which the weights are'
        in message
    )


def test_an_export_is_not_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", "run", "exported.safetensors", "--to", "timm"])
    capsys.readouterr()
    message = refused(capsys, "reduce", "exported.safetensors", "--to", "new.safetensors", "reduction.keep=0.5")
    assert message == "error: exported.safetensors: is an export (--to timm): name the run or its weights\n"


def test_a_reduced_file_is_reduced_along_the_other_axis(capsys: pytest.CaptureFixture[str]) -> None:
    reduced(capsys, "run", "--to", "grouped.safetensors", *FEW, "reduction.strategy=grouped")
    both = ["reduction.strategy=grouped", "reduction.keep=0.5"]
    output, _ = reduced(capsys, "grouped.safetensors", "--config", "run", "--to", "both.safetensors", *FEW, *both)
    assert f"{parameters('grouped.safetensors'):,}" in output
    made = read_weights(Path("both.safetensors")).reduction
    assert made is not None
    assert made.model_dump()["keep"] == 0.5


def plain(name: str, *settings: str) -> str:
    """A state dict as another program saves it, of the run's model with a reduction, and its number of parameters."""
    config = load_config("run", settings)
    model = build_model(config.model, config.reduction, seed=1)
    torch.save(model.state_dict(), name)
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


FOUR = ["reduction.strategy=grouped", "reduction.group_size=4"]


def test_a_plain_state_dict_is_reduced_along_the_other_axis(capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks share an MLP also where neither the file nor the config says so."""
    count = plain("plain.pth", *FOUR)
    arguments = ["plain.pth", "--config", "run", "--to", "cut.safetensors", "--no-refit", "--units", "first"]
    output, settings = reduced(capsys, *arguments, *FOUR, "reduction.keep=0.5")
    assert count in output
    config = load_config("run", settings)
    found: list[Coverage] = []
    build_model(config.model, config.reduction, seed=3, on_weights=found.append)
    assert found[0].already_reduced
    Path("cut.safetensors").unlink()
    message = refused(capsys, "reduce", *arguments, *FOUR)
    assert 'config: reduction.strategy = "grouped": the weights are reduced so already' in message


@pytest.mark.parametrize(
    ("made_with", "wanted", "expected"),
    [
        (["strategy=grouped", "group_size=4"], "shallow", "grouped"),
        (["strategy=shallow", "keep=0.25"], "grouped", "shallow"),
        (["strategy=thin"], "grouped", "shallow"),
        (["strategy=thin"], "thin", "thin"),
        (["strategy=none"], "grouped", "none"),
    ],
)
def test_the_reduction_of_a_plain_state_dict_is_recognised(made_with: list[str], wanted: str, expected: str) -> None:
    count = plain("plain.pth", *(f"reduction.{setting}" for setting in made_with))
    trained = load_trained(trained_config("plain.pth", "run", [f"reduction.strategy={wanted}"]))
    assert trained.config.reduction.strategy == expected
    assert f"{sum(parameter.numel() for parameter in trained.network.parameters()):,}" == count
    state = torch.load("plain.pth")
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.network.state_dict().items())


def test_without_data_weights_can_still_be_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    alone = ["--units", "weights", "--no-refit", "reduction.strategy=shallow"]
    output, _ = reduced(capsys, "bare", "--to", "out.safetensors", *alone)
    assert "Not evaluated: there are no validation shards." in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--to", "out.pth"], "--to out.pth: must end with .safetensors"),
        (["run", "--to", f"{'x' * 240}.safetensors"], "x.safetensors: cannot be written (File name too long)"),
        (["run", "--to", "no/out.safetensors"], "error: no: no such folder"),
        (["run", "--to", "run/final.safetensors"], "run/final.safetensors: already exists; choose another name"),
        (
            ["run", "--to", "x.safetensors"],
            'config: reduction.strategy = "none": give reduction.strategy=grouped, shallow or thin',
        ),
        (
            ["run", "--to", "x.safetensors", "reduction.strategy=grouped", "reduction.groups=[[0,1]]", *PAIRS],
            "--choose-pairs sets reduction.groups, and reduction.groups is given too: leave out one of the two",
        ),
        (
            ["run", "--to", "x.safetensors", "reduction.strategy=grouped", "reduction.group_size=4", *PAIRS],
            "--choose-pairs sets reduction.groups, and reduction.group_size is given too: leave out one of the two",
        ),
        (
            ["run", "--to", "x.safetensors", "reduction.strategy=shallow", "reduction.blocks=[1]", *BLOCKS],
            "--choose-blocks sets reduction.blocks, and reduction.blocks is given too: leave out one of the two",
        ),
        (["run", "--to", "x.safetensors", "--units", "best"], "invalid choice: 'best'"),
        (["run", "--to", "x.safetensors", "--ridge", "0"], "argument --ridge: 0: must be above 0"),
        (["run", "--to", "x.safetensors", "reduction.strategy=grouped", "reduction.group_size=3"], "allowed: 2, 4"),
        (["run", "--to", "x.safetensors", "reduction.strategy=shallow", "reduction.blocks=[4]"], "names block 4"),
        (["run", "--to", "x.safetensors", "reduction.strategy=grouped", "--choose-pairs", "3", *FEW], "not as many"),
        (["bare", "--to", "x.safetensors", "reduction.strategy=grouped"], "no shards at nowhere"),
        (
            ["run", "--to", "x.safetensors", "reduction.strategy=shallow", "--choose-pairs", "1", "--no-refit", *FEW],
            "--choose-pairs sets reduction.groups, which 'shallow' does not have: give reduction.strategy=grouped",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "reduce", *arguments)


# --- analyze ----------------------------------------------------------------------------------------------


def test_an_analysis_is_printed_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main(["analyze", "run", "--output", "analysis", "--validation-images", "40", *FEW])
    output = capsys.readouterr().out
    assert "on 40 validation images" in output
    assert "least first: " in output
    found = json.loads(Path("analysis/analysis.json").read_text())
    assert [row["blocks"] for row in found["pairs"]] == [[0, 1], [1, 2], [2, 3]]
    assert [row["hidden"] for row in found["blocks"]] == [96] * 4
    assert all(value is not None for row in found["pairs"] + found["blocks"] for value in row.values())
    for name, rows in (("pairs", found["pairs"]), ("blocks", found["blocks"])):
        with Path(f"analysis/{name}.csv").open(newline="") as file:
            assert [list(row) for row in csv.DictReader(file)] == [list(row) for row in rows]
    for name in ("sharing", "hidden_units", "attention_distance", "attention_maps"):
        assert Path(f"analysis/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_replaced_by_an_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    (Path("folder") / "note").touch()
    for output, message in (
        ("file", "file: is a file, not a folder"),
        ("folder", "folder: already exists; choose another name"),
        ("no/folder", "no: no such folder"),
        ("file/folder", "file: no such folder"),
    ):
        assert refused(capsys, "analyze", "run", "--output", output) == f"error: {message}\n"


def test_figures_need_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalevit.errors.find_spec", lambda module: None)
    message = refused(capsys, "analyze", "run", "--output", "analysis2")
    assert "the package 'matplotlib' is not installed; install the extra: pip install 'scalevit[plots]'" in message
    assert not Path("analysis2").exists()
    assert "torch" in sys.modules


@pytest.mark.parametrize(
    ("trained", "reduced"),
    [
        (["reduction.strategy=shallow", "reduction.keep=0.75"], ["reduction.keep=0.5"]),
        (
            ["reduction.strategy=grouped", "reduction.group_size=2"],
            ["reduction.group_size=null", "reduction.groups=[[0,1]]"],
        ),
        (["reduction.strategy=none"], ["reduction.strategy=grouped", "reduction.keep=0.5"]),
    ],
)
def test_the_printed_settings_make_one_reduction_of_the_other(trained: list[str], reduced: list[str]) -> None:
    before, after = load_config(None, trained), load_config(None, [*trained, *reduced])
    again = load_config(None, [*trained, *overrides_of(before, after)])
    assert again.reduction == after.reduction
