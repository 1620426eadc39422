"""`scalevit sweep` and `scalevit runs`: a real sweep on the digits, what they print, and wrong uses."""

import json
import os
import re
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from scalevit import files
from scalevit.cli import sweep as command
from scalevit.cli.main import main
from scalevit.cli.sweep_view import SweepView
from scalevit.reports.sweeps import execution, model_check
from scalevit.reports.sweeps.plan import make_plan
from scalevit.runs.status import Best, RunStatus

FAKE = [sys.executable, "-I", "-S", str(Path(__file__).parents[1] / "support" / "fake_trainer.py")]
SWEEP = ["sweep", "--config", "quickstart", "--vary", "reduction=none,thin"]
TINY = [
    *("model.kwargs.depth=2", "model.kwargs.embed_dim=24", "train.max_steps=3", "train.log_every_steps=1"),
    *("data.workers=0", "engine.name=fsdp"),
]


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        main(arguments)
        status = 0
    except SystemExit as ending:
        status = ending.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- a real sweep -----------------------------------------------------------------------------------------


def test_a_sweep_on_the_digits(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    assert ended([*SWEEP, "--seeds", "1", *TINY], capsys)[0] == 0
    monkeypatch.setattr(command, "check_models", lambda plan, ranks: {})  # done once
    status, out, err = ended([*SWEEP, "--seeds", "2", *TINY], capsys)
    assert status == 0, err
    names = ["none-seed1", "none-seed2", "thin-seed1", "thin-seed2"]
    assert re.findall(r"^(\S+): started$", err, re.MULTILINE) == ["none-seed2", "thin-seed2"], "it is extended"
    folder = Path("runs/quickstart-sweep")
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in names]
    assert [(each["reduction"], each["seed"], each["steps"]) for each in summaries] == [
        *(("none", 1, 3), ("none", 2, 3), ("thin", 1, 3), ("thin", 2, 3))
    ]
    for reduction, own in (("none", summaries[:2]), ("thin", summaries[2:])):
        mean = sum(each["ema"]["top1"] for each in own) / 2
        assert re.search(rf"reduction={reduction} +2/2 +{mean:.2f} ± ", out)
    assert out.endswith(f"4 of 4 runs are finished; tables and figures: scalevit report {folder}\n")
    status, out, err = ended([*SWEEP, "--seeds", "2", *TINY], capsys)
    assert (status, err) == (0, ""), "nothing is started again"
    _check_the_list_of_runs(names, summaries, capsys)


def _check_the_list_of_runs(names: list[str], summaries: list[dict], capsys: pytest.CaptureFixture[str]) -> None:
    out = ended(["runs"], capsys)[1]
    assert out.rstrip().endswith("4 finished")
    listed = {each["name"]: each for each in json.loads(ended(["runs", "--json"], capsys)[1])}
    assert sorted(listed) == names
    for name, summary in zip(names, summaries, strict=True):
        assert (listed[name]["state"], listed[name]["step"], listed[name]["steps"]) == ("finished", 3, 3)
        assert listed[name]["best"]["ema"]["top1"] == summary["ema"]["top1"]
        assert re.search(rf"quickstart-sweep/{name} +finished +1/50 +3/3 ", out)


def test_a_model_that_cannot_be_built_is_found_before_the_first_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported torch already."""
    plan = make_plan("quickstart", TINY, ["model.name=vit_tiny_patch16_224,vit_tny_patch16_224"], [1])
    asked = {run.combination: run.config.model_dump(mode="json") for run in plan.runs}
    monkeypatch.setattr("sys.stdin", StringIO(json.dumps(asked)))
    model_check.main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert error.startswith('sweep with model.name=vit_tny_patch16_224: config: model.name = "vit_tny_patch16_224": ')
    assert error.endswith("nearest: vit_tiny_patch16_224")


# --- with a fake trainer ----------------------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sweeps are run by the fake trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACT", raising=False)
    real = execution.Execution.run
    monkeypatch.setattr(execution.Execution, "run", lambda self, shares, given=(): real(self, shares, given, FAKE))
    monkeypatch.setattr(command, "check_models", lambda plan, ranks: dict.fromkeys(plan.combinations, 1234))
    monkeypatch.setattr("scalevit.cluster.children._SECONDS_BETWEEN_LOOKS", 0.005)
    return tmp_path / "runs" / "quickstart-sweep"


def test_a_failed_run_is_named_at_the_end(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACT", '{"none-seed2": "mistake", "thin-seed1": "preempted"}')
    status, out, err = ended([*SWEEP, "--seeds", "2", "--parallel", "1"], capsys)
    log = "runs/quickstart-sweep/logs/none-seed2.log"
    assert status == 1
    assert f"none-seed2: failed: train.micro_batch = 7: does not fit (log: {log})\n" in err
    assert f"failed: none-seed2: train.micro_batch = 7: does not fit (log: {log})\n" in out
    assert "interrupted: thin-seed1: is not finished (log: runs/quickstart-sweep/logs/thin-seed1.log)\n" in out
    assert "2 of 4 runs are finished" in out
    listed = ended(["runs"], capsys)[1]
    assert "2 finished, 1 interrupted, 1 failed" in listed
    assert "quickstart-sweep/none-seed2: train.micro_batch = 7: does not fit\n" in listed


def test_a_run_of_another_process_is_left_to_it(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fakes / "thin-seed1" / "checkpoints").mkdir(parents=True)
    with files.locked(fakes / "thin-seed1" / "checkpoints" / ".lock"):
        status, out, _ = ended([*SWEEP, "--seeds", "1,"], capsys)
    assert status == 1
    assert "running: thin-seed1: in another process\n" in out
    assert not (fakes / "logs" / "thin-seed1.log").exists()


def test_ctrl_c_before_the_first_run_is_no_traceback(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(plan: object, ranks: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "check_models", interrupted)
    assert ended([*SWEEP, "--seeds", "2"], capsys) == (130, "", "stopped before the first run\n")
    assert not fakes.exists()


def test_two_sweeps_at_once_are_refused(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.mkdir(parents=True)
    with files.locked(fakes / ".lock"):
        status, _, err = ended([*SWEEP, "--seeds", "1,"], capsys)
        assert status == 2
        assert err.endswith("another sweep is using it; wait for its end\n")
        assert err.count("\n") == 1
        assert ended([*SWEEP, "--seeds", "1,", "--only", "0"], capsys)[0] == 0, "a task of Slurm's"
    assert [path.name for path in fakes.glob("*-seed1")] == ["none-seed1"]


def test_a_dry_run_starts_nothing(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = ended([*SWEEP, "--vary", "lr=1e-3,0.1", "--seeds", "1,", "--dry-run"], capsys)
    assert (status, err) == (0, "")
    assert re.search(r"^ +3 +thin-lr0.1-seed1 +thin +0.1 +1 +1,234 +not started", out, re.MULTILINE)
    assert out.endswith("4 runs in runs/quickstart-sweep\n")
    assert not fakes.exists()


def test_a_script_for_slurm(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SWEEP, "--seeds", "3", "--ranks", "4", "--parallel", "2", "lr=1", "name=a b"]
    given[-2:] = ["optimizer.lr=0.1", "data.train=a b"]
    status, out, _ = ended([*given, "--slurm", "sweep.sbatch"], capsys)
    assert status == 0
    assert out.endswith("then: sbatch sweep.sbatch\n")
    script = Path("sweep.sbatch").read_text()
    assert script.startswith("#!/bin/bash\n")
    assert "\n#SBATCH --array=0-5%2\n" in script
    assert "\n#SBATCH --gpus-per-node=4\n" in script
    (line,) = [line for line in script.splitlines() if line.startswith("exec ")]
    expected = (
        "sweep --config quickstart --vary reduction=none,thin --seeds 3 --ranks 4 optimizer.lr=0.1 'data.train=a b'"
    )
    assert line == f'exec {sys.executable} -m scalevit {expected} --only "$SLURM_ARRAY_TASK_ID"'
    assert sorted(path.name for path in (fakes / "configs").iterdir())[0] == "none-seed1.json", "it is recorded"
    assert ended([*given, "--slurm", "sweep.sbatch"], capsys)[0] == 2, "nothing is replaced"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "quickstart"], "name what differs: --vary KEY=V1,V2, --seeds, or both"),
        (["--config", "quickstart", "--vary", "redction=none"], "--vary redction: is not a setting"),
        (["--config", "quickstart", "--vary", "reduction=none,grupped"], "sweep with reduction=grupped: config:"),
        (["--config", "quickstart", "--seeds", "0"], "--seeds 0: must be 1 to 1000 seeds"),
        (["--config", "quickstart", "--seeds", "2", "--parallel", "9999"], "--parallel 9999: there are only"),
        (["--config", "quickstart", "--seeds", "2", "--only", "2"], "--only 2: the sweep has runs 0 to 1"),
        (["--config", "quickstart", "--seeds", "2", "--name", "a/b"], "--name 'a/b': must have letters"),
        (["--config", "qickstart", "--seeds", "2"], "nearest: quickstart"),
    ],
)
def test_wrong_uses_are_one_line(
    arguments: list[str], message: str, fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = ended(["sweep", *arguments], capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not fakes.exists()


def test_under_a_launcher_it_is_refused(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "use --ranks instead" in ended([*SWEEP, "--seeds", "1,"], capsys)[2]


# --- what is shown ----------------------------------------------------------------------------------------


def test_the_list_of_an_empty_and_of_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["runs", str(tmp_path)], capsys) == (0, f"no runs in {tmp_path}\n", "")
    assert ended(["runs", str(tmp_path / "x")], capsys) == (2, "", f"error: {tmp_path}/x: no such folder\n")
    assert ended(["runs", str(tmp_path), "--json"], capsys)[1] == "[]\n"


def test_the_list_names_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{")
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "good" / "config.json").write_text("{}")
    os.utime(tmp_path / "good" / "metrics.jsonl", (1, 1))
    os.utime(tmp_path / "good" / "config.json", (1, 1))
    lines = ended(["runs", str(tmp_path)], capsys)[1].splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["damaged", "good"], "the latest is first"
    assert lines[4:] == ["2 interrupted", "damaged: config.json is damaged"]


def statuses(count: int) -> Mapping[str, RunStatus]:
    running = RunStatus(
        *(Path("a0"), "running", 10, 40, 1, 4, 2.0),
        best={"ema": Best(60.0, 1)},
        seconds=10.0,
        seconds_left=30.0,
    )
    others = [RunStatus(Path(f"a{number}"), "finished", seconds=20.0) for number in range(1, count)]
    return {status.name: status for status in (*others, running)}


def test_the_live_table_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120, height=14)
    monkeypatch.setattr("scalevit.cli.sweep_view.Console", lambda stderr: console)
    with SweepView([], together=1) as view:
        view.refresh(statuses(20))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    rows = [line for line in shown if line.startswith("a")]
    assert rows[-6].split() == ["a0", "running", "1/4", "10/40", "2.0000", "60.00", "(1)", "-", "30", "s"]
    assert shown[-1].strip() == "1 running, 19 finished, about 30 s left; 14 not shown"


def test_without_a_terminal_progress_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scalevit.cli.sweep_view._SECONDS_BETWEEN_LINES", 0.0)
    with SweepView([], together=1) as view:
        view.refresh(statuses(2))
    assert capsys.readouterr().err.splitlines() == [
        "a0: step 10/40, loss 2.0000, best top-1 60.00 % (EMA), 30 s left",
        "sweep: 1 running, 1 finished, about 30 s left",
    ]
