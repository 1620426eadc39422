"""`scalevit from-timm`: where the config and the lines go, and what timm knows of the model."""

import json
from pathlib import Path

import pytest

from commands import refused
from scalevit.cli.from_timm import TimmRegistries
from scalevit.cli.main import main
from scalevit.config.loading import load_config
from scalevit.training.setting_checks import check_settings

TINY = "train.py --model vit_tiny_patch16_224"
COMMAND = "./distributed_train.sh 2 /photos --model vit_small_patch16_384 --opt adamw --fuser te --experiment birds"


def test_the_config_is_on_the_output_and_the_lines_are_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["from-timm", COMMAND])
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content.pop("about") == {"timm": COMMAND}
    config = load_config(content)
    assert (config.model.image_size, config.model.num_classes) == (384, 1000), "as timm's model has them"
    assert (config.name, config.train.global_batch) == ("vit_small_baseline", 256)
    assert "--fuser te: not kept" in captured.err
    assert "name=birds keeps it" in captured.err


@pytest.mark.parametrize(
    ("model", "drop_path"),
    [("swin_tiny_patch4_window7_224", 0.1), ("vit_tiny_patch16_224", 0.0)],
)
def test_what_timm_knows_of_a_model(model: str, drop_path: float) -> None:
    facts = TimmRegistries().model(model)
    assert (facts.image_size, facts.num_classes, facts.crop_mode) == (224, 1000, "center")
    assert facts.drop_path == drop_path


@pytest.mark.parametrize(
    ("options", "processes", "engine"),
    [
        ("--opt adamw", 4, None),
        ("--opt lamb", 4, {"name": "fsdp"}),
        ("--clip-grad 0.1 --clip-mode agc", 4, {"name": "fsdp"}),
        ("--opt adafactor", 1, {"name": "fsdp"}),
        ("--opt adafactor", 4, {"stage": 0}),
    ],
)
def test_the_engine_can_run_the_recipe(
    options: str, processes: int, engine: dict[str, object] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["from-timm", f"{TINY} {options}", "--gpus", str(processes)])
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    del content["about"]
    assert content.get("engine") == engine
    assert ("scalevit's default engine, ZeRO 1, cannot run this" in captured.err) == (engine is not None)
    check_settings(load_config(content), ranks=processes)


def test_it_writes_a_new_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["from-timm", COMMAND, "--exact", "--gpus", "4", "--output", "birds.json"]
    main(arguments)
    assert capsys.readouterr().out == "wrote birds.json; start it by: scalevit train --config birds.json\n"
    config = load_config("birds.json")
    assert (config.name, config.train.global_batch, config.train.micro_batch) == ("birds", 512, 128)
    assert "birds.json: already exists" in refused(capsys, *arguments)
    assert "nowhere: no such folder" in refused(capsys, "from-timm", COMMAND, "--output", "nowhere/x.json")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (
            "train.py --model vit_smal_patch16_224",
            "--model vit_smal_patch16_224: is not a timm model; nearest: vit_small",
        ),
        ("train.py --opt adamv --opt-eps 1e-8", "--opt adamv: is not an optimizer of timm; nearest: adam"),
        ("train.py --model resnet18", 'model.name = "resnet18": has batch norms'),
        (f"{TINY} --opt adamv", 'optimizer.name = "adamv": is not an optimizer of timm; nearest: adam (from --opt)'),
        (f"{TINY} --opt ''", 'optimizer.name = "": is not an optimizer of timm'),
        (f"{TINY} --opt adamw --opt-kwargs foo=3", "argument 'foo') (from --opt-kwargs)"),
        (f"{TINY} --aa foo-m9", "is not a timm auto-augment policy"),
        (f"{TINY} --model-kwargs foo=3", "unexpected keyword argument 'foo'"),
        (f"{TINY} --kd-model-name vit_tny_patch16_224", "is not a timm model; nearest: vit_tiny_patch16_224"),
        ("train.py --lrr 3", "unknown option --lrr (nearest: --lr)"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(command: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part in refused(capsys, "from-timm", command)


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the command is missing" in refused(capsys, "from-timm")
