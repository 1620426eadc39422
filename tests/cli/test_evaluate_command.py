"""`scalevit evaluate` as a user calls it, on validation shards with bad samples."""

import json
import shutil
from pathlib import Path

import pytest

from commands import refused
from launching import QUICKSTART, Outcome, Workplace
from scalevit.config.loading import load_config
from scalevit.data.shards.index import load_index
from scalevit.export.source import find_source
from scalevit.models.build import build_model
from scalevit.models.weights.write import write_weights

DAMAGED = 6
SETTINGS = [
    "reduction.strategy=none",
    "model.kwargs.depth=1",
    "model.kwargs.embed_dim=24",
    "engine.name=fsdp",
    "data.workers=0",
    "data.builtin=null",
    "data.train=nowhere",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Workplace:
    """Weights, and the digits' validation shards with bytes changed in some of its images."""
    folder = tmp_path_factory.mktemp("work")
    config = load_config(QUICKSTART, SETTINGS)
    model = build_model(config.model, config.reduction, seed=0)
    settings = {"model": config.model, "reduction": config.reduction}
    write_weights(folder / "weights.safetensors", dict(model.named_parameters()), **settings, tied={})
    shutil.copytree(digits / "validation", folder / "validation", ignore=shutil.ignore_patterns(".*"))
    index = load_index(digits / "validation")
    for sample in range(DAMAGED):
        path = folder / "validation" / Path(index.shards[index.shard[sample]].path).name
        content = bytearray(path.read_bytes())
        content[index.offset[sample] + index.size[sample] // 2] ^= 0x55
        path.write_bytes(content)
    return Workplace(folder)


def evaluate(workplace: Workplace, *settings: str) -> Outcome:
    paths = ["data.validation=validation", "model.initial_weights=weights.safetensors"]
    return workplace.evaluate("--config", QUICKSTART, *SETTINGS, *paths, *settings)


def test_bad_samples_are_counted_and_the_first_are_named(workplace: Workplace) -> None:
    outcome = evaluate(workplace, f"data.max_faults={DAMAGED}")
    assert outcome.status == 0, outcome.errors
    result = json.loads(outcome.output)
    assert result["data_faults"] == DAMAGED
    assert result["top5"] < 100
    assert outcome.errors.count("warning: bad sample: shard validation/") == 5
    assert "warning: ... and 1 more; `scalevit shards verify` lists all" in outcome.errors
    assert not (workplace.folder / "runs").exists(), "an evaluation writes into no run folder"


def test_more_bad_samples_than_the_limit_are_one_line(workplace: Workplace) -> None:
    outcome = evaluate(workplace, f"data.max_faults={DAMAGED - 1}")
    assert (outcome.status, outcome.output) == (2, "")
    errors = [line for line in outcome.errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: config: data.max_faults = {DAMAGED - 1}: found {DAMAGED} bad samples")
    assert "`scalevit shards verify` lists all" in errors[0]


def test_a_run_or_a_file_needs_no_config(workplace: Workplace, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    settings = {"extends": QUICKSTART, "model": {"kwargs": {"depth": 1, "embed_dim": 24}}}
    settings |= {"reduction": {"strategy": "none"}, "engine": {"name": "fsdp"}}
    settings |= {"data": {"workers": 0, "builtin": None, "validation": str(workplace.folder / "validation")}}
    (run_folder / "config.json").write_text(json.dumps(settings))
    for name in ("best.safetensors", "final.safetensors"):
        shutil.copy(workplace.folder / "weights.safetensors", run_folder / name)
    results = []
    for target in (run_folder, run_folder / "final.safetensors"):
        outcome = Workplace(tmp_path).evaluate(str(target), f"data.max_faults={DAMAGED}")
        assert outcome.status == 0, outcome.errors
        results.append(json.loads(outcome.output))
    assert [Path(result["weights"]).name for result in results] == ["best.safetensors", "final.safetensors"]
    # With an EMA that was better or worse in the run.
    shutil.copy(workplace.folder / "weights.safetensors", run_folder / "best_ema.safetensors")
    for ema_top1, expected in ((80.0, "best_ema.safetensors"), (60.0, "best.safetensors")):
        record = {"kind": "evaluation", "step": 1, "top1": 70.0, "ema_top1": ema_top1}
        (run_folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        source = find_source(str(run_folder))
        assert source.path == run_folder / expected
        assert source.config.model.initial_weights == str(source.path)
    expected = json.loads(evaluate(workplace, f"data.max_faults={DAMAGED}").output)["loss"]
    assert [result["loss"] for result in results] == [expected, expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run folder or a weights file, or give --config"),
        (["empty"], "run folder empty: has none of best_ema.safetensors"),
        (["lr=0.1", "data.workers=0"], "run folder lr=0.1: has none of best_ema.safetensors"),
        (["lr=0.2", "data.workers=0"], "name a run folder or a weights file, or give --config"),
        (["nowhere.safetensors"], "weights nowhere.safetensors: no such file"),
        (["alone/x.safetensors"], "there is no config.json beside it: give --config"),
        (["--config", "quickstart"], "model.initial_weights = null"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("empty", "alone", "lr=0.1"):
        (tmp_path / name).mkdir()
    (tmp_path / "alone" / "x.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "evaluate", *arguments)
