"""The config tree and its file reader: what is accepted, and the one line that says what is not."""

import math
from pathlib import Path

import pytest

from scalevit.config.loading import load_config
from scalevit.errors import UserError
from scalevit.models.reductions.grouped import GroupedReduction
from scalevit.models.reductions.shallow import ShallowReduction

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.json") if path.name != "schema.json")


def message(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path)


def test_the_recipe_is_the_papers() -> None:
    config = load_config(CONFIGS / "grouped.json")
    assert config.reduction == GroupedReduction(group_size=2, scale=1 / math.sqrt(2))
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.schedule.warmup_epochs) == (1e-3, 0.05, 5)
    assert (config.train.epochs, config.train.global_batch, config.model.drop_path) == (300, 1024, 0.1)
    augmentation = config.data.augmentation
    assert (augmentation.mixup, augmentation.cutmix, augmentation.random_erasing) == (0.8, 1.0, 0.25)
    assert (augmentation.aug_repeats, augmentation.auto_augment) == (3, "rand-m9-mstd0.5-inc1")
    assert (config.ema.decay, config.loss.label_smoothing, config.seed) == (0.9998, 0.1, 42)


def test_overrides_win_over_the_file_and_the_file_over_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.json").write_text('{"seed": 1, "train": {"epochs": 10, "global_batch": 512}}')
    child = tmp_path / "child.json"
    child.write_text('{"extends": "parent.json", "train": {"epochs": 20}}')
    config = load_config(child, ["train.global_batch=2048", "name=abc"])
    assert (config.seed, config.train.epochs, config.train.global_batch, config.name) == (1, 20, 2048, "abc")


def test_a_config_among_the_overrides_lies_between_the_config_and_the_settings(tmp_path: Path) -> None:
    (tmp_path / "parent.json").write_text('{"seed": 5, "model": {"kwargs": {"depth": 2}}}')
    (tmp_path / "small.json").write_text('{"extends": "parent.json", "train": {"epochs": 7, "global_batch": 32}}')
    layer = f"@{tmp_path / 'small.json'}"
    config = load_config("grouped", ["train.epochs=9", layer])
    assert (config.seed, config.train.epochs, config.train.global_batch) == (5, 9, 32)
    assert (config.model.kwargs, config.reduction.strategy) == ({"depth": 2}, "grouped")
    twice = load_config("grouped", [layer, "@quickstart"])
    assert (twice.name, twice.train.epochs, twice.train.global_batch) == ("quickstart", 50, 64)
    assert load_config(None, ["@thin"]).reduction.strategy == "thin"
    assert message("@quickstrt").startswith("config quickstrt: no such file or preset; nearest: quickstart")


def test_changing_the_kind_of_a_section_starts_it_anew() -> None:
    config = load_config(CONFIGS / "grouped.json", ["reduction.strategy=shallow", "engine.name=fsdp"])
    assert config.reduction == ShallowReduction()
    assert config.engine.name == "fsdp"
    same_kind = load_config(CONFIGS / "grouped.json", ["reduction.strategy=grouped", "reduction.group_size=3"])
    assert same_kind.reduction.model_dump()["group_size"] == 3


def test_settings_that_stand_alone_speak_of_the_default_kind() -> None:
    assert load_config(None, ["engine.stage=2"]).engine.model_dump()["stage"] == 2


@pytest.mark.parametrize("text", ["2024", "1e3", "-1.50", "18446744073709551616"])
def test_a_number_is_text_where_a_string_is_expected(text: str) -> None:
    if text.startswith("-"):
        assert 'name = "-1.50": must be a string matching' in message(f"name={text}")
    else:
        assert load_config(None, [f"name={text}"]).name == text
    nested = load_config(None, [f"data.cache={text}", "engine.name=fsdp", f"data.label_key={text}"])
    assert (nested.data.cache, nested.data.label_key) == (text, text)
    assert load_config(None, ["engine.stage=3", "engine.offload_parameters=nvme", f"engine.nvme_path={text}"])


def test_only_overrides_are_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"name": 2024}')
    assert "name = 2024: must be a string" in message(path=path)
    assert "name = null: must be a string" in message("name=null")
    assert load_config(None, ["model.kwargs.depth=4"]).model.kwargs == {"depth": 4}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.epoch=3"], ["train.epoch = 3", "nearest: train.epochs"]),
        (["reduction.strategy=grupped"], ["reduction.strategy", '"grupped"', "nearest: grouped", "shallow"]),
        (["reduction.strategy=shallow", "reduction.kep=0.3"], ["reduction.kep = 0.3", "nearest: reduction.keep"]),
        (["train.epochs=ten"], ["train.epochs", '"ten"', "an integer above 0"]),
        (['train.epochs="3"'], ["train.epochs", "an integer above 0"]),
        (["train.epochs=0"], ["train.epochs = 0", "above 0"]),
        (["train.precision=fp8"], ["train.precision", '"bf16"', '"fp16"', '"fp32"']),
        (["train.precision=pf16"], ["nearest", "fp16"]),
        (["engine.name=fsdp", "engine.stage=1"], ["engine.stage = 1", "reshard_after_forward"]),
        (["engine.stage=4"], ["engine.stage = 4", "0, 1, 2, 3"]),
        (["data.mean=[1, 0]"], ["data.mean = [1, 0]", "a list of 3 values"]),
        (['data.mean=[1, 0, "a"]'], ["data.mean.2", "a number"]),
        (["data.augmentation.crop_scale=[1.0, 0.1]"], ["crop_scale", "must not be greater"]),
        (["data.augmentation.crop_scale=[2, 3]"], ["crop_scale", "at most"]),
        (["data.builtin=digits", "data.train=s3://bucket/x"], ["s3://bucket/x", "plain folder"]),
        (["seed=18446744073709551616"], ["seed"]),
        (["engine.native.gradient_clippingg=5"], ["gradient_clippingg", "not a DeepSpeed setting"]),
        (["engine.native.bfloat16.enabled=true"], ["bfloat16", "train.precision"]),
        (["optimizer.lr=NaN"], ["optimizer.lr", "a number above 0"]),
        (["train.micro_batch=automatic"], ["train.micro_batch", "auto"]),
        (["schedule.warmup_epochs=300"], ["schedule.warmup_epochs", "below train.epochs = 300"]),
        (["engine.stage=0", "engine.overlap_comm=true"], ["overlap_comm = true", "stage 1 or above, not 0"]),
        (["engine.stage=0", "engine.offload_optimizer=cpu"], ["offload_optimizer", "stage 1 or above"]),
        (["engine.stage=2", "engine.offload_optimizer=nvme", "engine.nvme_path=x"], ["nvme", "stage 3", "not 2"]),
        (["engine.stage=2", "engine.offload_parameters=cpu"], ["offload_parameters", "stage 3 or above, not 2"]),
        (["engine.stage=3", "engine.offload_parameters=nvme"], ["nvme_path", "need each other"]),
        (["engine.nvme_path=x"], ["nvme_path", "need each other"]),
        (["engine.offload_optimizer=disk"], ["engine.offload_optimizer", '"cpu"', '"nvme"']),
        (["engine.native.zero_optimization.overlap_comm=true"], ["overlap_comm", "engine.overlap_comm"]),
        (
            ['engine.native.zero_optimization.offload_optimizer={"device": "cpu"}'],
            ["offload_optimizer", "engine.offload_optimizer"],
        ),
        (["engine.native.zero_force_ds_cpu_optimizer=false"], ["engine.offload_optimizer"]),
        (["engine.native.compile.deepcompile=true"], ["native.compile", "train.compile"]),
        (["engine.name=fsdp", "engine.shard_size=0"], ["engine.shard_size = 0", "above 0"]),
        (["engine.name=fsdp", "engine.prefetch=-1"], ["engine.prefetch = -1", "above 0"]),
        (["engine.name=fsdp", "engine.mixed_precision=bf16"], ["mixed_precision", '"autocast"', '"policy"']),
        (
            ["engine.name=fsdp", "engine.mixed_precision=policy", "train.precision=fp32"],
            ["mixed_precision = policy", "bf16 or fp16, not fp32"],
        ),
        (["engine.stage=2", "train.meta_init=true"], ["meta_init", "engine.name = fsdp or engine.stage = 3"]),
        (["engine.native.fp16.enabled=true"], ["native.fp16", "train.precision"]),
        (["engine.native.zero_optimization.cpu_offload=true"], ["cpu_offload", "engine.offload_optimizer"]),
        (["engine.native.prescale_gradients=true"], ["prescale_gradients", "stage 0, not 1"]),
        (["engine.native.zero_optimization.stage=2"], ["zero_optimization.stage", "engine.stage"]),
        (["train=3"], ["train = 3", "a section"]),
        (["reduction=none"], ["reduction", "a section"]),
        (["name=a/b"], ["name", "a/b"]),
        (["noequals"], ["'noequals'", "key.sub=value"]),
        (["train.epochs=3", "train.epochs.x=3"], ["train.epochs", "plain value"]),
    ],
)
def test_mistakes_are_named(overrides: list[str], parts: list[str]) -> None:
    text = message(*overrides)
    for part in parts:
        assert part in text, text


def test_two_groupings_conflict() -> None:
    text = message("reduction.strategy=grouped", "reduction.group_size=2", "reduction.groups=[[0,1]]")
    assert "not both" in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"seed": 1, "seed": 2}', "twice"),
        ('{"extends": 3}', "extends"),
        ('{"about": "fast"}', "about"),
        ('{"extends": "missing.json"}', "missing.json"),
        ('{"extends": "config.json"}', "circular"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert part in message(path=path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no.json" in message(path=tmp_path / "no.json")


def test_a_run_folder_is_a_config_and_a_preset_comes_before_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("grouped", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"seed": 7}')
    assert (load_config("mine").seed, load_config("grouped").seed) == (7, 42)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config empty: is a folder without a config\.json"):
        load_config("empty")
