"""Whole runs. Where the start is what is tested, as a user starts them: each such process imports torch and DeepSpeed
anew, so there are few. The others are forked from one process."""

import gzip
import json
import os
import re
import runpy
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launching import (
    BIN,
    QUICKSTART,
    SCRIPT,
    SECONDS,
    Workplace,
    command,
    finish,
    losses,
    metrics,
    run,
    start,
)
from scalevit.config.loading import load_config
from scalevit.data.shards.index import load_index
from scalevit.distributed import World
from scalevit.errors import SettingError, UserError
from scalevit.models.weights.read import read_classes
from scalevit.training.engine_builder import EngineBuilder

STEPS = 24
# Mixing, drop-path and random erasing on: their randomness must not depend on ranks or restarts either.
SETTINGS = [
    "data.workers=0",
    "data.augmentation.mixup=0.8",
    "data.augmentation.cutmix=1.0",
    "data.augmentation.aug_repeats=3",
    "data.augmentation.random_erasing=0.25",
    "model.drop_path=0.1",
    "model.kwargs.depth=4",
    "model.kwargs.embed_dim=48",
    "train.log_every_steps=1",
    "train.global_batch=32",
    "train.micro_batch=8",
    f"train.max_steps={STEPS}",
    "schedule.warmup_epochs=0",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(digits)
    return folder


@pytest.fixture(scope="module")
def forks(workplace: Path) -> Workplace:
    return Workplace(workplace)


def launch(workplace: Path, launcher: list[str], name: str, *settings: str) -> Path:
    outcome = run([*launcher, "--config", QUICKSTART, f"name={name}", *SETTINGS, *settings], cwd=workplace)
    assert outcome.status == 0, outcome.output + outcome.errors
    return workplace / "runs" / name


def train(forks: Workplace, name: str, *settings: str, ranks: int = 1) -> Path:
    outcome = forks.run(name, ["--config", QUICKSTART, f"name={name}", *SETTINGS, *settings], ranks=ranks)
    assert outcome.status == 0, outcome.output
    return forks.folder / "runs" / name


@pytest.fixture(scope="module")
def single(workplace: Path) -> Path:
    """The run that the others must equal: one process, plain `python`."""
    return launch(workplace, command("python"), "single")


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("deepspeed", ["engine.stage=3"]),
        ("torchrun", ["engine.name=fsdp"]),
    ],
)
def test_two_processes_give_the_single_process_curve(single: Path, workplace: Path, launcher, settings) -> None:
    folder = launch(workplace, command(launcher, processes=2), f"two_{launcher}", *settings)
    # The order of summation differs; over a few steps the difference grows from 1e-7 by Adam's division.
    assert losses(folder) == pytest.approx(losses(single), rel=1e-5)
    ours, theirs = metrics(folder, "evaluation")[-1], metrics(single, "evaluation")[-1]
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=100 / 360 + 1e-9)  # at most one image flips
    assert ours["ema_loss"] == pytest.approx(theirs["ema_loss"], rel=1e-5)


def test_a_run_leaves_its_files(single: Path) -> None:
    summary = json.loads((single / "summary.json").read_text())
    for key in ("top1", "top5", "best_epoch", "peak_to_final_gap", "images_per_second", "parameters", "seed"):
        assert isinstance(summary[key], int | float), key
        if key in ("top1", "top5", "best_epoch", "peak_to_final_gap"):
            assert isinstance(summary["ema"][key], int | float), key
    assert (summary["engine"]["name"], summary["world_size"], summary["steps"]) == ("deepspeed", 1, STEPS)
    assert [record["step"] for record in metrics(single)] == list(range(1, STEPS + 1))
    config = json.loads((single / "config.json").read_text())
    assert config["data"]["mean"] == [0.5, 0.5, 0.5], "what the model decides is written out"
    assert json.loads((single / "environment.json").read_text())["packages"]["torch"]
    digits = [str(digit) for digit in range(10)]
    assert json.loads((single / "classes.json").read_text()) == digits
    assert read_classes(single / "best_ema.safetensors") == tuple(digits)
    assert {path.name for path in single.glob("*.safetensors")} == {
        "best.safetensors",
        "best_ema.safetensors",
        "final.safetensors",
        "final_ema.safetensors",
    }


def test_interrupted_and_started_again_it_goes_on(single: Path, workplace: Path) -> None:
    for attempt in range(5):
        name = f"interrupted{attempt}"
        arguments = [*command("deepspeed"), "--config", QUICKSTART, f"name={name}", *SETTINGS]
        process = start(arguments, cwd=workplace)
        folder = workplace / "runs" / name
        deadline = time.monotonic() + SECONDS
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
            assert process.poll() is None, finish(process)
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C: launcher and ranks alike
        interrupted = finish(process)
        done = len(metrics(folder))
        if done < STEPS:
            break  # else the run was over before this process had its turn
    assert 3 <= done < STEPS
    assert interrupted.status != 0
    assert "stopping after this step" in interrupted.errors
    assert "stopped after step" in interrupted.errors, "a checkpoint was saved"
    again = run(arguments, cwd=workplace)
    assert again.status == 0, again.errors
    assert f"resuming runs/{name} at step {done}" in again.output
    # Same engine, same world: the same numbers, bit for bit.
    assert losses(folder) == losses(single)


def test_a_checkpoint_goes_on_with_the_other_engine_and_more_ranks(single: Path, forks: Workplace) -> None:
    half = STEPS // 2
    train(forks, "moved", f"train.max_steps={half}", "engine.stage=1", "ema.enabled=false")
    refused = forks.run("refused", ["--config", QUICKSTART, "name=moved", *SETTINGS])
    assert refused.status == 2
    assert "settings that have changed (ema.enabled: false -> true): undo that" in refused.output
    folder = train(forks, "moved", "engine.name=fsdp", 'train.resume_changes=["ema"]', ranks=2)
    assert "changed since that checkpoint: ema.enabled: false -> true\n" in forks.log("moved")
    (resumed,) = metrics(folder, "resume")
    assert resumed["step"] == half
    assert resumed["changes"]["ema.enabled"] == [False, True]
    assert resumed["changes"]["engine.name"] == ["deepspeed", "fsdp"]
    kept = json.loads((folder / "config.json").read_text())["about"]["changes"]
    assert kept == [{"step": half, "changes": resumed["changes"]}]
    assert load_config(str(folder / "config.json"), []).engine.name == "fsdp", "still a config"
    assert losses(folder) == pytest.approx(losses(single), rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ema"]["best_epoch"] == metrics(folder, "evaluation")[-1]["epoch"], "an EMA that began half-way"


def test_evaluating_weights_gives_what_the_run_said(single: Path, forks: Workplace) -> None:
    weights = f"model.initial_weights={single / 'final_ema.safetensors'}"
    settings = ["--config", QUICKSTART, *SETTINGS, weights, "data.train=nowhere", "data.builtin=null"]
    outcome = forks.evaluate(*settings)
    assert outcome.status == 0, outcome.errors
    said = metrics(single, "evaluation")[-1]
    assert json.loads(outcome.output)["loss"] == pytest.approx(said["ema_loss"], rel=1e-6)
    other = forks.evaluate(*settings, "model.num_classes=12")
    assert other.status == 2
    assert "have a classifier of 10 classes, but model.num_classes = 12" in other.errors


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_torchrun_starts_a_single_process(single: Path, workplace: Path, script: str) -> None:
    """With a store of the agent's own, at a port that it chose or was given: that store must serve the one rank."""
    if script == "train":
        launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "1"]
        settings = ["name=alone", "train.max_steps=1"]
    else:
        launcher = command("torchrun")[:-1]
        settings = [f"model.initial_weights={single / 'final.safetensors'}"]
    launched = [*launcher, str(Path(SCRIPT).with_name(f"{script}.py"))]
    outcome = run([*launched, "--config", QUICKSTART, *SETTINGS, *settings], cwd=workplace)
    assert outcome.status == 0, outcome.output + outcome.errors


def test_a_finished_run_shows_its_results_again(single: Path, forks: Workplace) -> None:
    before = losses(single)
    folder = train(forks, "single")
    assert losses(folder) == before


@pytest.mark.parametrize(("ranks", "engine"), [(1, "engine.stage=2"), (2, "engine.name=fsdp")])
def test_a_profile_holds_the_chosen_steps_and_their_parts(forks: Workplace, ranks: int, engine: str) -> None:
    chosen = ["train.profile=true", "train.profile_after=2", "train.profile_steps=2", "train.max_steps=6"]
    folder = train(forks, f"profile_{ranks}", engine, *chosen, ranks=ranks) / "profile" / "steps_3_4"
    traces = [folder / f"trace_rank{rank}.json.gz" for rank in range(ranks)]
    assert sorted(folder.glob("trace*")) == traces
    accumulation = 4 // ranks  # micro-batches of 8 in a global batch of 32
    for path in traces:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        labels = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert sorted(label for label in labels if re.fullmatch(r"step \d+", label)) == ["step 3", "step 4"]
        counts = {label: labels.count(label) for label in ("data wait", "forward", "backward", "optimizer step", "EMA")}
        assert counts == {
            "data wait": 2,
            "forward": 2 * accumulation,
            "backward": 2 * accumulation,
            "optimizer step": 2,
            "EMA": 2,
        }
        assert any(event["name"] == "[memory]" for event in events)
    assert "memory snapshots on CUDA devices only" in (folder / "memory.txt").read_text()


def test_a_profile_that_cannot_be_written_is_told_in_one_line(forks: Workplace, workplace: Path) -> None:
    arguments = ["--config", QUICKSTART, *SETTINGS, "train.profile=true", "train.max_steps=2"]
    outcome = forks.run("early", [*arguments, "name=early"])
    assert outcome.status == 0, outcome.errors
    said = [line for line in outcome.output.splitlines() if "no profile was written" in line]
    assert len(said) == 1, outcome.output
    assert "before step 11" in said[0]
    assert not list((workplace / "runs" / "early" / "profile").iterdir())
    blocked = workplace / "runs" / "blocked"
    blocked.mkdir(parents=True)
    (blocked / "profile").write_text("a file where the folder should be")
    outcome = forks.run("blocked", [*arguments, "name=blocked"])
    expect_one_line(outcome.status, outcome.errors, "runs/blocked/profile", "cannot be written")
    assert metrics(blocked) == [], "told before the first step"


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["engine.stage=2", "engine.name=fsdp"])
def test_on_a_gpu_fused_and_eager_runs_agree(workplace: Path, engine: str) -> None:
    curves = []
    for mlp in ("eager", "triton"):
        settings = [engine, f"kernels.mlp={mlp}", "train.precision=bf16", "train.max_steps=100"]
        folder = launch(workplace, command("python"), f"gpu_{mlp}_{engine[-1]}", *settings)
        curves.append(losses(folder))
    # bf16 rounds either way: single steps differ, their mean over a stretch of the curve does not.
    eager, fused = (sum(curve[-20:]) / 20 for curve in curves)
    assert fused == pytest.approx(eager, rel=0.02)


def expect_one_line(status: int, errors: str, *parts: str) -> None:
    assert status == 2
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    # Once per rank: where the launcher is slow to end the other ranks, they report the same.
    assert len(set(lines)) == len(lines), errors
    assert len({re.sub("^error: (rank [0-9]+: )?", "", line) for line in lines}) == 1, errors
    for part in parts:
        assert part in lines[0], lines[0]


def test_missing_shards_end_every_rank_with_one_line(workplace: Path) -> None:
    grouped = Path(QUICKSTART).with_name("grouped.json")
    arguments = [*command("deepspeed", processes=2), "--config", str(grouped), "data.train=nowhere/train"]
    outcome = run(arguments, cwd=workplace)
    expect_one_line(outcome.status, outcome.errors, "nowhere/train", "scalevit shards write")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["train.epoch=3"], ["train.epoch", "nearest: train.epochs"]),
        (["kernels.mlp=triton"], ['kernels.mlp = "triton"', "the tensors are on a CPU"]),
        (["model.image_size=2"], ["2"]),
        (["reduction.strategy=grupped"], ["grupped", "nearest: grouped"]),
        (["model.name=resnet18", "model.kwargs={}"], ["has batch norms"]),
        (["model.num_classes=5"], ["label", "5"]),
        (["data.validation=nowhere", "data.builtin=null"], ["nowhere"]),
        (["data.augmentation.mixing_group=3"], ["data.augmentation.mixing_group = 3", "even"]),
        (["name=single", "train.resume=false"], ["train.resume = false", "runs/single"]),
        (["name=never", "train.resume=true"], ["train.resume = true", "runs/never"]),
        (["name=single", *SETTINGS, "reduction.strategy=none"], ["another reduction"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_mistakes_end_with_one_line(
    settings: list[str],
    parts: list[str],
    single: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process: all of these end before the process group, and importing torch nine times would take minutes.
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", [SCRIPT, "--config", QUICKSTART, *settings])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    expect_one_line(ended.value.code, capsys.readouterr().err, *parts)


def test_what_building_the_engine_refuses_is_named_by_its_config_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> None:
        raise SettingError("optimizer_args", {"fused": True}, "adamw refuses them")

    config = load_config(QUICKSTART, [])
    monkeypatch.setattr(type(config.engine), "build", build)
    build_engine = EngineBuilder(config, World.from_environment(), "elements")
    with pytest.raises(UserError, match=r'^config: optimizer\.args = {"fused": true}: adamw refuses them$'):
        build_engine(micro_batch=1, accumulation=1)


def test_more_ranks_than_images_end_with_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", [SCRIPT, "--config", QUICKSTART])
    monkeypatch.setattr("scalevit.errors._SECONDS_FOR_RANK_ZERO", 0.0)
    for rank, said in ((0, "error: config: train.global_batch"), (1, "error: rank 1: ")):
        for key, value in {"WORLD_SIZE": 65, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(key, str(value))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(SCRIPT, run_name="__main__")
        errors = capsys.readouterr().err
        expect_one_line(ended.value.code, errors, said, "train.global_batch = 64", "at least the 65 ranks")


def test_bad_samples_are_replaced_listed_and_counted_and_other_data_is_refused(
    forks: Workplace, workplace: Path, digits: Path
) -> None:
    """Two ranks; 3 training images and 1 validation image are damaged in place."""
    folder = workplace / "damaged"
    shutil.copytree(digits, folder, ignore=shutil.ignore_patterns(".*"))
    for part, count in (("train", 3), ("validation", 1)):
        index = load_index(digits / part)
        for sample in range(count):
            path = folder / part / Path(index.shards[index.shard[sample]].path).name
            content = bytearray(path.read_bytes())
            content[index.offset[sample] + index.size[sample] // 2] ^= 0x55
            path.write_bytes(content)
    settings = ["data.train=damaged/train", "data.validation=damaged/validation", "data.builtin=null"]
    # An epoch, so that every image comes up.
    settings += ["train.max_steps=46", "data.augmentation.aug_repeats=1", "data.transforms=fast"]
    run_folder = train(forks, "damaged", *settings, "engine.name=fsdp", ranks=2)
    records = [json.loads(line) for line in (run_folder / "data_faults.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert {record["reason"] for record in records} == {"the image's bytes have changed (wrong checksum)"}
    assert json.loads((run_folder / "summary.json").read_text())["data_faults"] == 4
    assert metrics(run_folder, "evaluation")[-1]["top1"] <= 100 * 359 / 360
    base = ["--config", QUICKSTART, *SETTINGS, *settings]
    limited = forks.run("limited", [*base, "name=limited", "data.max_faults=2"])
    expect_one_line(limited.status, limited.errors, "data.max_faults = 2: found", "data_faults.jsonl")
    other = forks.run("other", [*base, "name=damaged", "train.max_steps=50", "train.global_batch=64"])
    expect_one_line(other.status, other.errors, "train.global_batch: 32 there, 64 now")
