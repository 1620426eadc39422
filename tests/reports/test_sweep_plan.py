"""Plans of sweeps: keys, values, seeds, names, and every combination checked; what a sweep's folder records."""

import json
from pathlib import Path

import pytest

from scalevit.errors import UserError
from scalevit.reports.sweeps.plan import make_plan, parse_seeds, parse_variation
from scalevit.reports.sweeps.record import check_record, config_file, write_record


def names(*variations: str, seeds: list[int] | None = None) -> list[str]:
    return [run.name for run in make_plan("quickstart", [], variations, seeds).runs]


def test_the_product_of_values_and_seeds() -> None:
    plan = make_plan("quickstart", ["train.epochs=7"], ["reduction=none,thin", "lr=1e-3,0.01"], [1, 5])
    assert [run.name for run in plan.runs] == [
        *("none-lr0.001-seed1", "none-lr0.001-seed5", "none-lr0.01-seed1", "none-lr0.01-seed5"),
        *("thin-lr0.001-seed1", "thin-lr0.001-seed5", "thin-lr0.01-seed1", "thin-lr0.01-seed5"),
    ]
    assert plan.combinations == [f"reduction={name}, lr={lr}" for name in ("none", "thin") for lr in ("0.001", "0.01")]
    last = plan.runs[-1]
    assert last.folder == Path("runs/quickstart-sweep/thin-lr0.01-seed5")
    config = last.config
    assert (config.reduction.kind(), config.optimizer.lr, config.seed, config.train.epochs) == ("thin", 0.01, 5, 7)
    assert (config.name, config.output_dir) == ("thin-lr0.01-seed5", "runs/quickstart-sweep")


def test_seeds_alone_and_a_name() -> None:
    plan = make_plan("quickstart", ["output_dir=elsewhere"], [], [3], name="x")
    assert [run.folder for run in plan.runs] == [Path("elsewhere/x/seed3")]
    assert plan.combinations == ["all"]
    assert names("reduction=none") == ["none-seed42"], "the config's seed"


@pytest.mark.parametrize(
    ("variation", "expected"),
    [
        ("ema.enabled=true,false", ["ema.enabled_true", "ema.enabled_false"]),
        ("data.augmentation.crop_scale=[0.8,1.0],[0.5,1]", ["crop_scale_0.8_1.0", "crop_scale_0.5_1"]),
        ("model.kwargs.depth=2,4", ["depth2", "depth4"]),
        ('model.kwargs={"depth": 2},{"depth": 3}', ["model.kwargs_depth_2", "model.kwargs_depth_3"]),
        ("auto_augment=null,rand-m9", ["auto_augment_null", "rand_m9"]),
        ("recipe=@grouped,@paper/thin", ["grouped", "paper_thin"]),
        ("reduction.keep=0.5", ["reduction.keep0.5"]),
    ],
)
def test_names_are_of_the_values(variation: str, expected: list[str]) -> None:
    config = "shallow" if "keep" in variation else "quickstart"
    assert [run.name for run in make_plan(config, [], [variation], [1]).runs] == [f"{name}-seed1" for name in expected]


def test_configs_as_values() -> None:
    plan = make_plan("quickstart", ["train.epochs=7"], ["reduction=none,@thin"], [1])
    assert [run.config.reduction.kind() for run in plan.runs] == ["none", "thin"]
    assert [run.config.train.epochs for run in plan.runs] == [7, 7], "settings come after configs"


def test_a_long_name_keeps_its_seed() -> None:
    (name,) = names(f"data.train={'x' * 300}", seeds=[8])
    assert len(name) < 130
    assert name.endswith("-seed8")


@pytest.mark.parametrize(
    ("variation", "message"),
    [
        ("reduction", "--vary 'reduction': must have the form KEY=V1,V2,..."),
        ("reduction=none,,thin", "must have the form KEY=V1"),
        ("=3", "must have the form"),
        ("reduction=none,none", "--vary reduction: the value none is given twice"),
        ("lr=0.001,1e-3", "--vary lr: the value 0.001 is given twice"),
        ("redction=none", "--vary redction: is not a setting; nearest: reduction"),
        ("learning_rate=1", "--vary learning_rate: is not a setting; nearest: optimizer.lr; `scalevit config show`"),
        ("every_epochs=1,2", "is not one key; name one of train.checkpoint.every_epochs, evaluation.every_epochs"),
        ("seed=1,2", "--vary seed: cannot be varied; use --seeds"),
        ("name=a,b", "--vary name: cannot be varied"),
        ("train=1", "--vary train: is a section; name one of its settings, e.g. train.epochs"),
    ],
)
def test_wrong_variations(variation: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_variation(variation)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("variations", "message"),
    [
        (["reduction=none,grupped"], 'sweep with reduction=grupped: config: reduction.strategy = "grupped"'),
        (
            ["reduction=grouped,thin", "reduction.group_size=3"],
            "reduction=thin, reduction.group_size=3: config: unknown",
        ),
        (["recipe=@thinn"], "sweep with recipe=@thinn: config thinn: no such file or preset; nearest: thin"),
        (["epochs=2,30"], "sweep with epochs=2: config: schedule.warmup_epochs = 2: must be below"),
        (["reduction=none", "reduction.strategy=thin"], "--vary reduction.strategy: is given twice"),
        (["data.train=a/b,a.b,a_b"], "sweep: two runs would be called a_b-seed42 (data.train=a/b and data.train=a_b)"),
    ],
)
def test_a_wrong_combination_is_named(variations: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan("quickstart", [], variations)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_seeds() -> None:
    assert parse_seeds("3") == [1, 2, 3]
    assert parse_seeds("3,") == [3]
    assert parse_seeds("0, 7") == [0, 7]


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1,,2", "1,1", "1.5", "9" * 30, "1001", "³"])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


# --- the record -------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_record(make_plan("quickstart", [], ["reduction=none,thin"], [1]))
    return tmp_path / "runs" / "quickstart-sweep"


def test_a_sweep_is_extended_by_values_and_seeds(recorded: Path) -> None:
    write_record(make_plan("quickstart", ["data.workers=3"], ["reduction=thin,shallow"], [1, 2]))
    record = json.loads((recorded / "sweep.json").read_text())
    assert list(record["runs"]) == ["none-seed1", "thin-seed1", "thin-seed2", "shallow-seed1", "shallow-seed2"]
    assert record["runs"]["thin-seed2"] == {"values": {"reduction": "thin"}, "seed": 2}
    settings = json.loads(config_file(recorded / "thin-seed1").read_text())
    assert settings["about"] == {"sweep": "reduction=thin"}
    assert settings["data"]["workers"] == 3, "settings of the machine may change"


@pytest.mark.parametrize(
    ("overrides", "variation", "seed", "message"),
    [
        (["train.epochs=60"], "reduction=none", 1, "was made with other settings (train.epochs: 50 -> 60): undo that"),
        (["train.epochs=60"], "reduction=shallow", 2, "was made with other settings (train.epochs: 50 -> 60): undo"),
        ([], "optimizer.lr=1", 1, "varies reduction.strategy, not optimizer.lr: choose another --name"),
    ],
    ids=["same run", "new run", "key"],
)
def test_another_sweep_is_refused(
    overrides: list[str], variation: str, seed: int, message: str, recorded: Path
) -> None:
    before = {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        write_record(make_plan("quickstart", overrides, [variation], [seed]))
    assert message in str(error.value)
    assert before == {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}


def test_a_config_among_the_values_may_change_any_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(make_plan("quickstart", [], ["recipe=@grouped"], [1]))
    write_record(make_plan("quickstart", [], ["recipe=@grouped,@recipes/deit_small"], [1, 2]))
    with pytest.raises(UserError, match=r"train.epochs: 300 -> 9"):
        write_record(make_plan("quickstart", ["train.epochs=9"], ["recipe=@grouped"], [1]))


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": {}}', '{"runs": [], "varied": {}}'])
def test_a_damaged_record_is_one_line(content: str, recorded: Path) -> None:
    (recorded / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep.json: is damaged; restore it, or choose another --name"):
        check_record(make_plan("quickstart", [], ["reduction=none"], [1]))


def test_a_runs_folder_is_no_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a run's; choose another --name"):
        check_record(make_plan("quickstart", [], [], [1], name="x"))
