"""`scalevit config`: explains, compares and checks settings."""

from pathlib import Path

import pytest

from commands import refused
from scalevit.cli.main import main
from scalevit.config.keys import all_keys


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["config", *arguments])
    return capsys.readouterr().out


def test_every_key_is_shown_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    output = said(capsys, "show")
    for key in all_keys():
        assert key.is_section or f"{key.name}: {key.allowed}"[:60] in output
        assert key.meaning
    assert max(map(len, output.splitlines())) <= 100


def test_one_key_and_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    one = said(capsys, "show", "train.micro_batch", "--config", "quickstart")
    assert one.startswith(
        'train.micro_batch: an integer above 0 or "auto"  default: "auto"  here: 32\n    Maximum number'
    )
    section = said(capsys, "show", "engine")
    assert "engine.shard_size: " in section
    assert "(with engine.name = fsdp)" in section
    assert "optimizer.lr" not in section
    assert said(capsys, "show", "model.kwargs").startswith("model.kwargs: a section")
    assert "schedule.args: a section" in said(capsys, "show", "schedule"), "an object of free keys is listed too"
    several = said(capsys, "show", "optimizer.lr", "data.workers")
    assert ("optimizer.lr: " in several, "data.workers: " in several) == (True, True)


def test_a_config_selects_the_types_that_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "show", "reduction", "--config", "grouped")
    assert "reduction.group_size: " in shown
    assert "(with reduction.strategy = shallow)" not in shown
    assert shown.count("reduction.strategy: ") == 1


def test_what_differs_between_configs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = said(capsys, "diff", "baseline", "grouped").splitlines()
    assert 'reduction.strategy: "none" -> "grouped"' in lines
    assert "reduction.group_size: not set -> 2" in lines
    assert said(capsys, "diff", "grouped", "grouped") == "no differences\n"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"extends": "grouped", "seed": 7, "about": {"changes": []}}')
    assert said(capsys, "diff", "grouped", str(run)) == "seed: 42 -> 7\n"


def test_a_config_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "check", "quickstart", "train.epochs=9").startswith("quickstart: valid (data, weights, ")
    unused = [
        "optimizer.clip_grad=null",
        "optimizer.clip_mode=agc",
        "train.compile_mode=max-autotune-no-cudagraphs",
        "ema.warmup_gamma=3",
    ]
    assert "valid" in said(capsys, "check", "quickstart", *unused), "settings without effect"


def test_a_further_config_is_laid_over(capsys: pytest.CaptureFixture[str]) -> None:
    over = said(capsys, "diff", "grouped", "@recipes/digits").splitlines()
    assert 'data.builtin: null -> "digits"' in over
    assert not [line for line in over if line.startswith("reduction")], "over the first one"
    shown = said(capsys, "show", "--config", "grouped", "@recipes/digits", "train.epochs=7", "data.builtin")
    assert 'here: "digits"' in shown
    assert "here: 7" in said(capsys, "show", "train.epochs", "train.epochs=7", "--config", "grouped")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "lr"], "unknown key lr; nearest: optimizer.lr; "),
        (["check", "grouped", "optimizer.lr=-1"], "config: optimizer.lr = -1: must be"),
        (["diff", "grouped", "gruoped"], "no such file or preset; nearest: grouped"),
        (["diff", "grouped", "@gruoped"], "no such file or preset; nearest: grouped"),
        (["show", "--config", "@grouped"], "config @grouped: @ lays a config over another, and follows it"),
        (["show", "@grouped"], "scalevit config show @grouped: changes a config: name one by --config"),
        (["check", "grouped", "@"], "override '@': must name a config, e.g. @recipes/digits"),
        (["check", "--config", "grouped"], "configs are given without --config: scalevit config check grouped ..."),
        (["check", "quickstart", "optimizer.name=adamv"], 'optimizer.name = "adamv": is not an optimizer of timm'),
        (["check", "quickstart", "optimizer.name=lamb"], 'optimizer.name = "lamb": its update needs norms'),
        (["check", "quickstart", "schedule.name=cosin"], "is not a schedule of timm; nearest: cosine"),
        (["check", "quickstart", "schedule.args.foo=1"], "config: schedule.args = "),
        (["check", "quickstart", "data.augmentation.auto_augment=foo"], "is not a timm auto-augment policy"),
        (["check", "quickstart", "model.name=vit_tny_patch16_224"], "nearest: vit_tiny_patch16_224"),
        ([], "the following arguments are required: ACTION"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "config", *arguments)


def test_an_option_that_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train", "--config", "quickstart"], ["config", "check", "quickstart"]):
        line = refused(capsys, *command, "--epochs", "3")
        assert "unrecognized arguments: --epochs" in line
        assert "; settings are given as train.epochs=VALUE" in line


def test_a_learning_rate_that_is_scaled_shows_its_peak(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "scaled.json").write_text('{"optimizer": {"lr": 0.1, "lr_base_batch": 256}}')
    shown = said(capsys, "show", "optimizer.lr", "--config", str(tmp_path / "scaled.json"))
    assert shown.endswith("    at train.global_batch = 1024: 0.4 at the peak\n")
    assert "1024: 0.4 at the peak" in said(capsys, "show", "optimizer", "--config", str(tmp_path / "scaled.json"))
    assert "at train.global_batch" not in said(capsys, "show", "optimizer.lr", "--config", "quickstart")
