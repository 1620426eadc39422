"""timm's options that belong together, what is said of a conversion, and the paper's commands. No torch."""

from pathlib import Path
from typing import Any

import pytest

from scalevit.config.from_timm.conversion import ModelFacts
from scalevit.config.from_timm.text import config_text
from scalevit.config.loading import load_config
from scalevit.errors import UserError
from timm_commands import VIT, Timm, converted, leaves, values

# --- what belongs together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--lr-base 0.01 --opt adamw", {"optimizer.lr": 0.01, "optimizer.lr_scaling": "sqrt"}),
        ("--lr-base 0.01 --opt adamw --lr-base-scale linear", {"optimizer.lr_scaling": "linear"}),
        ("--lr 0.01 --lr-base-size 3", {"optimizer.lr": 0.01, "optimizer.lr_base_batch": None}),
        ("--bce-loss --bce-sum", {"loss.name": "bce", "loss.sum_classes": True, "loss.label_smoothing": 0.1}),
        ("--bce-loss --smoothing 0", {"loss.name": "cross_entropy", "loss.label_smoothing": 0.0}),
        ("--bce-loss --smoothing 0 --mixup 0.5", {"loss.name": "bce", "loss.label_smoothing": 0.0}),
        ("--sched wsd", {"schedule.args": {"decay_epochs": 90}}),
        ("--sched none", {"schedule.warmup_epochs": 0}),
        ("--lr-noise 0.5 0.9 --seed 3", {"schedule.args.noise_seed": 3, "schedule.args.noise": [0.5, 0.9]}),
        (
            "--pretrained --initial-checkpoint a.pth.tar",
            {"model.initial_weights": "a.pth.tar", "model.pretrained": False},
        ),
        ("--pretrained --pretrained-path a.safetensors", {"model.initial_weights": "a.safetensors"}),
        ("--input-size 3 192 256", {"model.image_size": 192}),
        ("--input-size 1 64 64", {"model.image_size": 64, "model.in_chans": 1}),
        ("--in-chans 1 --mean 0.5", {"model.in_chans": 1, "data.mean": [0.5, 0.5, 0.5]}),
        ("--mixup 0.8 -b 64", {"data.augmentation.mixing_group": 64}),
        (
            "--no-aug --aa rand-m9",
            {"data.augmentation.auto_augment": None, "data.augmentation.interpolation": "bicubic"},
        ),
        ("--reduction-strategy shallow", {"reduction.keep": 1.0}),
        ("--reduction-strategy grouped", {"reduction.scale": 2.0}),
        ("--amp --amp-dtype float16", {"train.precision": "fp16"}),
        ("--kd-model-name m --task-loss-weight 0.25", {"task.label_weight": 0.25, "task.distillation_weight": 0.75}),
        ("--kd-model-name m --distill-loss-weight 3", {"task.label_weight": 1.0, "task.distillation_weight": 3.0}),
        (
            "--dataset wds/imagenet --data-dir /w/",
            {"data.train": "/w/*train*.tar", "data.validation": "/w/*validation*.tar"},
        ),
        ("--dataset wds/i --data-dir /w --train-split 'i-{0..9}.tar|100'", {"data.train": "/w/i-{0..9}.tar"}),
        ("--dataset wds/i --data-dir /w --target-key cls", {"data.label_key": "cls"}),
        ("--dataset hfds/x/y --target-key label2", {"data.label_key": "label"}),
        ("/a/my\\ photos/", {"data.train": "data/my_photos/train"}),
        ("--val-interval 5", {"evaluation.every_epochs": 5, "train.checkpoint.every_epochs": 5}),
    ],
)
def test_options_that_belong_together(options: str, expected: dict[str, Any]) -> None:
    found = values(f"{VIT} {options}")
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--lr 0.1 --lr-base-size 3", "--lr-base-size 3: no effect in timm beside --lr"),
        ("--opt-eps 1e-8", "--opt-eps 1e-08: no effect in timm: sgd has no eps"),
        ("--opt adamw --momentum 0.5", "--momentum 0.5: no effect in timm: adamw has no momentum"),
        ("--bce-loss --smoothing 0", "--bce-loss: no effect in timm without mixing and smoothing"),
        ("--bce-loss --smoothing 0 --bce-sum", "--bce-sum: no effect in timm without mixing and smoothing"),
        ("--no-aug --aa rand-m9", "--aa rand-m9: no effect in timm beside --no-aug"),
        ("--sched none --warmup-epochs 3", "--warmup-epochs 3: no effect in timm with --sched none"),
        ("--lr-cycle-decay 0.3", "--lr-cycle-decay 0.3: no effect in timm with one cycle"),
        ("--pretrained --initial-checkpoint a.pth", "--pretrained: no effect in timm on weights beside"),
        ("--img-size 64 --model-kwargs img_size=32", "--model-kwargs img_size=32: not kept: images and model"),
        ("--img-size 64 --input-size 3 32 32", "--img-size 64: no effect in timm beside --input-size"),
        ("--data-dir /a /b", "/b: no effect in timm beside --data-dir"),
        ("--torchcompile eager", "--torchcompile eager: not kept"),
        ("--torchcompile --torchcompile-mode reduce-overhead", "--torchcompile-mode reduce-overhead: not kept"),
        ("--class-map map.pkl", "--class-map map.pkl: not kept"),
        ("--train-interpolation lanczos", "--train-interpolation lanczos: not kept"),
        ("--eval-metric top10", "--eval-metric top10: not kept: evaluation.metric is one of top1, top5, loss"),
        ("--aug-repeats 1.5", "--aug-repeats 1.5: not kept"),
        ("--input-size 1 64 64", "no data set is named"),
        ("--input-size 4 64 64", "--input-size 4 64 64: not kept: images have 3 channels"),
        ("--in-chans 2", "--in-chans 2: not kept: images have 3 channels"),
        ("--in-chans 1 --input-size 3 64 64", "--in-chans 1: no effect in timm beside --input-size"),
        ("--val-split ''", "--val-split '': not kept"),
        ("--reduction-strategy shallow", "reduces nothing with shallow"),
        (
            "--data-dir '/a b'",
            "scalevit shards write --source '/a b/train' --class-order natural --destination data/a_b/train",
        ),
        ("--dataset hfds/own/birds", "scalevit shards write --datasets own/birds --split validation"),
        (
            "--dataset hfds/x/y --input-key img --target-key label2",
            "--datasets x/y --image-column img --label-column label2 --split train",
        ),
        ("--dataset hfds/x/y --target-key a,b", "--target-key a,b: not kept: an image has one label"),
        ("/photos --target-key cls", "--target-key cls: no effect in timm with a folder of images"),
        ("--dataset tfds/birds --target-key cls", "--target-key cls: not kept: the labels are named"),
        ("--dataset wds/x --data-dir /w --target-key cls", "--target-key cls: data.label_key=cls is used where"),
        ("--dataset tfds/birds", "--dataset tfds/birds: not kept"),
        ("", "no data set is named"),
    ],
)
def test_what_is_not_kept_of_a_value_is_said(options: str, part: str) -> None:
    assert [line for line in converted(f"{VIT} {options}").lines if part in line]


def test_a_folder_is_found_under_the_names_that_timm_tries(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (line,) = [line for line in converted(f"{VIT} {tmp_path}").lines if line.endswith("/validation")]
    assert f"--source {tmp_path}/val " in line


def test_what_a_command_does_not_say_is_taken_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timm, "facts", ModelFacts(384, 10, "bilinear", "squash", 0.2))
    found = values(f"{VIT} --train-interpolation ''")
    expected = {
        "model.image_size": 384,
        "model.num_classes": 10,
        "model.drop_path": 0.2,
        "data.augmentation.interpolation": "bilinear",
        "data.crop_mode": "center",
        "data.interpolation": None,
    }
    assert {key: found[key] for key in expected} == expected
    given = values(f"{VIT} --img-size 64 --num-classes 3 --drop-path 0.1")
    assert (given["model.image_size"], given["model.num_classes"], given["model.drop_path"]) == (64, 3, 0.1)
    monkeypatch.setattr(Timm, "facts", ModelFacts(224, 0, "bicubic", "center", 0.0))
    with pytest.raises(UserError, match="--num-classes is missing"):
        converted(VIT)


def test_the_differences_are_named_and_written_with_exact() -> None:
    options = "--amp --model-ema --reduction-strategy grouped --reduction-mlp-ratio 0.707 --mixup 1 --reprob 0.25"
    command = f"./distributed_train.sh 2 /data --model vit_base_patch16_224 --aug-repeats 3 {options}"
    plain, exact = converted(command), converted(command, exact=True)
    expected = {
        "reduction.scale": 0.707,
        "kernels.mlp": "eager",
        "train.precision": "fp16",
        "train.matmul_precision": "high",
        "ema.shared_parameters": "per_use",
        "ema.start": "first_step",
        "data.exif_orientation": False,
        "data.augmentation.repeat_order": "timm",
        "data.augmentation.erase": "after_mixing",
    }
    found, defaults = (dict(leaves(done.config.model_dump(mode="json"))) for done in (exact, plain))
    assert {key: found[key] for key in expected} == expected
    assert found["data.augmentation.repeat_processes"] == 2
    assert found["ema.skipped_steps"] == "average"
    named = [line for line in plain.lines if line.startswith("timm ")]
    unnamed = [key for key in expected if not any(f" {key}=" in line for line in named)]
    assert unnamed == ["kernels.mlp"], "equal but for rounding"
    assert not [line for line in exact.lines if line.startswith("timm ")]
    assert [key for key in expected if defaults[key] == expected[key]] == []


# --- the paper's commands ---------------------------------------------------------------------------------

RECIPE = """--model vit_base_patch16_224 {} --batch-size 256 --grad-accum-steps 2 --opt adamw --lr 0.001 \\
    --weight-decay 0.05 --sched cosine --epochs 300 --warmup-epochs 5 --drop-path 0.1 --mixup 0.8 --cutmix 1.0 \\
    --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --aug-repeats 3 --amp --channels-last --pin-mem --workers 20 \\
    --model-ema --model-ema-decay 0.9998 --seed 42 --experiment {}_vit_b16"""
PAPER = {
    "baseline": ("", "baseline"),
    "grouped": ("--reduction-strategy grouped --reduction-mlp-ratio 0.707", "grouped_mlp"),
    "shallow": ("--reduction-strategy shallow --reduction-mlp-ratio 0.5", "shallow_mlp"),
    "thin": ("--reduction-strategy thin --reduction-mlp-ratio 2.0", "thin_mlp"),
}


def paper_command(preset: str) -> str:
    reduction, name = PAPER[preset]
    output = "" if preset == "baseline" else f" --output ./output/{name}"
    return f"./distributed_train.sh 2 /path/to/imagenet {RECIPE.format(reduction, name)}{output}"


@pytest.mark.parametrize("preset", PAPER)
def test_the_commands_of_the_paper_give_the_presets(preset: str, tmp_path: Path) -> None:
    done = converted(paper_command(preset))
    assert done.config == load_config(preset)
    path = tmp_path / "config.json"
    path.write_text(config_text(done.settings, {"timm": "the command"}))
    assert load_config(path) == load_config(preset)
    left_out = [line.split()[0].rstrip(":") for line in done.lines if line.startswith("--")]
    assert left_out == ["--workers", "--pin-mem", *(["--output"] if preset != "baseline" else []), "--experiment"]


@pytest.mark.parametrize("preset", PAPER)
def test_with_exact_they_give_the_presets_of_the_papers_behaviour(preset: str) -> None:
    done, paper = (
        dict(leaves(config.model_dump(mode="json")))
        for config in (converted(paper_command(preset), exact=True).config, load_config(f"paper/{preset}"))
    )
    differing = {key for key in paper if done[key] != paper[key] and not isinstance(paper[key], dict)}
    place = {"name", "data.workers", "train.micro_batch"}  # of the paper's machine and folders
    assert differing == place | ({"output_dir"} if preset != "baseline" else set())
