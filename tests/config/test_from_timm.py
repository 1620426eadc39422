"""timm's options: the table against timm's own list, each option's place, and commands of every form. No torch."""

import json
from pathlib import Path

import pytest

from config_keys import config_keys
from scalevit.config.from_timm.arguments import read_arguments
from scalevit.config.from_timm.launchers import split_command
from scalevit.config.from_timm.option import TimmOption
from scalevit.config.from_timm.page import markdown
from scalevit.config.from_timm.table import OPTIONS, TIMM_VERSION
from scalevit.config.loading import PRESETS
from scalevit.errors import UserError
from timm_commands import VIT, converted, leaves, values

FACTS = json.loads((Path(__file__).parent / "timm_train_options.json").read_text())


# --- the table --------------------------------------------------------------------------------------------


def test_the_table_has_the_options_of_timm_with_their_kinds_and_defaults() -> None:
    found = [
        {
            "flags": list(option.flags),
            "kind": option.form.kind,
            "nargs": "?" if option.name == "data" else option.form.nargs,
            "default": option.form.default,
        }
        for option in OPTIONS.values()
        if not option.paper
    ]
    expected = [{name: fact[name] for name in found[0]} for fact in FACTS["options"]]
    assert len(expected) == 173
    assert FACTS["version"] == TIMM_VERSION
    by_name = {"key": lambda fact: fact["flags"][-1]}
    assert sorted(found, **by_name) == sorted(expected, **by_name)


def test_values_that_timm_refuses_are_refused() -> None:
    """The table has more: those that timm's program refuses later."""
    for fact in FACTS["options"]:
        option = next(option for option in OPTIONS.values() if list(option.flags) == fact["flags"])
        assert not fact["choices"] or set(option.form.choices) == set(fact["choices"]), option.flag


def test_every_option_says_what_becomes_of_it() -> None:
    keys = config_keys()
    for option in OPTIONS.values():
        assert option.fate == "key" or option.fate == "machine" or option.note, option.flag
        assert set(option.keys) - {""} <= keys.keys(), option.flag
        assert not option.needs or option.needs in OPTIONS, option.flag


def test_the_page_is_current_and_has_every_option() -> None:
    page = (PRESETS.resolve().parent / "docs" / "from-timm.md").read_text()
    assert page == markdown() + "\n", "run: make schema"
    assert [flag for option in OPTIONS.values() for flag in option.flags if f"`{flag}`" not in page] == []


# --- each option ------------------------------------------------------------------------------------------

SAMPLES = {
    "data": "/photos",
    "dataset": "--dataset wds/birds",
    "in_chans": "--in-chans 1",
    "class_map": "--class-map names.txt",
    "input_size": "--input-size 3 192 192",
    "mean": "--mean 0.5",
    "std": "--std 0.5 0.25 0.5",
    "interpolation": "--interpolation bilinear",
    "scale": "--scale 0.5 0.75",
    "ratio": "--ratio 0.5 0.75",
    "cutmix_minmax": "--cutmix-minmax 0.2 0.8",
    "model_kwargs": "--model-kwargs depth=4 img_size=64",
    "opt_kwargs": "--opt-kwargs nesterov=True",
    "torchcompile_mode": "--torchcompile-mode max-autotune-no-cudagraphs",
    "lr_base_scale": "--lr-base-scale sqrt",
    "aug_splits": "--aug-splits 3",
    "aug_repeats": "--aug-repeats 3",
    "train_interpolation": "--train-interpolation bilinear",
    "eval_metric": "--eval-metric top5",
    "decay_milestones": "--decay-milestones 3 4",
    "torchcompile": "--torchcompile",
    "train_crop_mode": "--train-crop-mode rkrc",
    "model_dtype": "--model-dtype bfloat16",
    "train_img_sizes": "--train-img-sizes 128 160",
    "train_size_probs": "--train-size-probs 1 2",
}
# What an option has to be given with, so that it has an effect.
WITH = {
    "train_split": "--dataset wds/x --data-dir /shards",
    "val_split": "--dataset wds/x --data-dir /shards",
    "target_key": "--dataset wds/x --data-dir /shards",
    "jsd_loss": "--aug-splits 2",
    "opt_betas": "--opt adamw",
    "opt_eps": "--opt adamw",
    "lr_cycle_decay": "--lr-cycle-limit 2",
    "lr_cycle_mul": "--lr-cycle-limit 2",
    "no_prefetcher": "--reprob 0.25 --mixup 0.8",
    "kd_token_distill_type": "--kd-distill-type token",
    "reduction_mlp_ratio": "--reduction-strategy thin",
    "dataset": "--data-dir /photos",
}


def sample(option: TimmOption) -> str:
    """The option with a value that is neither timm's default nor ours."""
    form = option.form
    if option.name in SAMPLES:
        return SAMPLES[option.name]
    if form.kind == "switch":
        return option.flag
    if form.choices:
        return (
            f"{option.flag} {next(choice for choice in form.choices if choice not in (form.default, *option.neutral))}"
        )
    return f"{option.flag} { ({'integer': 7, 'number': 0.25, 'text': 'other'}[form.kind]) }"


def context(option: TimmOption) -> str:
    needed = f"{WITH.get(option.name, '')} {sample(OPTIONS[option.needs]) if option.needs else ''}"
    return f"{VIT} {needed}"


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "config"])
def test_an_option_lands_where_the_table_says(name: str) -> None:
    option = OPTIONS[name]
    without, command = context(option), f"{context(option)} {sample(option)}"
    before, after, lines = values(without, exact=True), values(command, exact=True), converted(command).lines
    value = read_arguments(command)[name]
    assert value != option.form.default
    if option.fate in ("key", "machine"):
        expected = value if option.convert is None else option.convert(value)
        assert after[option.keys[0]] == expected
        assert before.get(option.keys[0]) != expected
        left_out = [line for line in lines if line.startswith(f"{option.flag} ")]
        assert bool(left_out) == (option.fate == "machine")
        assert all(f"{option.keys[0]}=" in line for line in left_out)
    elif option.fate == "replaced":
        changed = {key for key in {**before, **after} if before.get(key) != after.get(key)}
        assert changed & set(option.keys)
    else:
        assert after == before
        assert [line for line in lines if line.startswith(option.flag) and f": {option.fate}: {option.note}" in line]


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.needs])
def test_what_timm_does_not_use_is_said(name: str) -> None:
    option = OPTIONS[name]
    command = f"{VIT} {WITH.get(name, '') if option.needs != 'reduction_strategy' else ''} {sample(option)}"
    assert values(command) == values(f"{VIT} {WITH.get(name, '') if option.needs != 'reduction_strategy' else ''}")
    (line,) = [line for line in converted(command).lines if line.startswith(f"{option.flag}")]
    assert f"no effect in timm without {OPTIONS[option.needs].flag}" in line


def test_an_option_that_is_not_given_has_the_default_of_timm() -> None:
    assert converted(VIT).settings == {
        "name": "vit_base_baseline",
        "model": {"name": "vit_base_patch16_224", "drop_path": 0.0},
        "data": {
            "train": "data/imagenet/train",
            "validation": "data/imagenet/validation",
            "augmentation": {
                **{"aug_repeats": 1, "auto_augment": None, "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
            },
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "lr_base_batch": 256, "weight_decay": 2e-5},
        "train": {"epochs": 300, "global_batch": 128, "precision": "fp32", "channels_last": False},
        "ema": {"enabled": False},
    }


# --- forms of commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("./distributed_train.sh 4 /data --model x", 4),
        ("torchrun --nproc_per_node=2 --nnodes 3 train.py --model x", 6),
        ("OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -- timm/train.py --model x", 2),
        ("torchrun --nproc_per_node=gpu train.py --model x", None),
        ("python -m torch.distributed.launch --nproc_per_node=8 train.py --model x", 8),
        ("CUDA_VISIBLE_DEVICES=0 python3 -u train.py --model x", 1),
        ("srun -n 16 python train.py --model x", 16),
        ("mpirun -np 3 python train.py --model x", 3),
        ("mpirun -n=5 python train.py --model x", 5),
        ("srun --ntasks=8 python train.py --model x", 8),
        ("srun -N 2 --ntasks-per-node 4 python train.py --model x", 8),
        ("srun --nodes=2 -n 6 --ntasks-per-node 4 python train.py --model x", 6),
        ("srun python train.py --model x", None),
        ("accelerate launch --num_processes 4 train.py --model x", 4),
        ("deepspeed --num_gpus=2 train.py --model x", 2),
        ("deepspeed --num_gpus 2 --num_nodes 2 train.py --model x", 4),
        ("deepspeed --include localhost:0,1 train.py --model x", None),
        ("deepspeed train.py --model x", None),
        ("other train.py --model x", None),
        ("--model x", None),
        ("python \\\n  train.py \\\r\n  --model \\\n x", 1),
    ],
)
def test_the_processes_of_a_launcher(command: str, processes: int | None) -> None:
    words, found = split_command(command)
    assert (words[-2:], found) == (["--model", "x"], processes)


def test_the_global_batch_is_that_of_all_processes() -> None:
    options = "--model vit_base_patch16_224 -b 32 --grad-accum-steps 3"
    assert values(f"./distributed_train.sh 4 /data {options}")["train.global_batch"] == 384
    assert converted(f"./distributed_train.sh 4 /data {options}", processes=2).config.train.global_batch == 192
    assert "--gpus" in converted(options).lines[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("--weight-decay=0.1", "--weight-d 0.1"),
        ("--lr 0.5 --lr 0.25", "--lr 0.25"),
        ("-b64 -j 2", "--batch-size 64 --workers 2"),
        ("--dr 0.5", "--decay-rate 0.5"),
        ("--mean 0.5 0.5 0.5", "--mean 0.5"),
        ("--opt lion --opt-betas 0.9 0.98 --amp /photos", "/photos --amp --opt-betas 0.9 0.98 --opt lion"),
        ("--data-dir /photos", "/photos"),
        ("--model-kwargs depth=2 --model-kwargs 'global_pool=avg'", "--gp avg"),
        ("--in-chans 3 --model-dtype float32 --drop-block 0 --input-img-mode RGB --start-epoch 0", ""),
    ],
)
def test_options_are_read_as_by_timm(first: str, second: str) -> None:
    assert values(f"{VIT} {first}", exact=True) == values(f"{VIT} {second}", exact=True)
    names = [line for line in converted(f"{VIT} {first}").lines if line.startswith("--")]
    assert all("machine" in line for line in names)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--lrr 3", ["unknown option --lrr", "nearest: --lr"]),
        (
            "--weight-dcay 3 --droppath=1",
            ["--weight-dcay (nearest: --weight-decay), --droppath (nearest: --drop-path)"],
        ),
        ("--lr abc", ["--lr", "invalid number value: 'abc'"]),
        ("--mixup nan", ["--mixup", "invalid number value: 'nan'"]),
        ("--epochs", ["--epochs", "expected one argument"]),
        ("--epochs 1.5", ["--epochs", "invalid int value: '1.5'"]),
        ("--input-size 3 224", ["--input-size", "expected 3 arguments"]),
        ("--lr-b 0.1", ["ambiguous option: --lr-b"]),
        ("--sched cosin", ["invalid choice: 'cosin'", "nearest: cosine"]),
        ("--model-kwargs depth", ["--model-kwargs: 'depth' is not NAME=VALUE"]),
        ("--torchcompile --torchscript --amp-impl apexx extra more", ["belongs to no option"]),
        ("--lr -1", ["optimizer.lr = -1.0", "(from --lr)"]),
        ("--epochs 3", ["schedule.warmup_epochs = 5", "train.epochs", "(from --epochs)"]),
        ("--scale 0 1", ["data.augmentation.crop_scale.0 = 0.0", "(from --scale)"]),
        ("--hflip 2", ["data.augmentation.hflip = 2.0", "(from --hflip)"]),
        ("--mixup 0.8 --aug-splits 2", ["splits = 2", "mixed"]),
        ("-c nowhere.yaml", ["nowhere.yaml: cannot be read"]),
        ("--model 'x", ["No closing quotation"]),
    ],
)
def test_a_mistake_in_a_command_is_one_line(options: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        converted(f"{VIT} {options}")
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("", "is empty"),
        ("scalevit train --config x", "neither"),
        ("./distributed_train.sh /data", "number of processes"),
    ],
)
def test_what_is_no_command_of_timm_is_refused(command: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        converted(command)


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_with_all_defaults_gives_the_same_as_a_command_without_options(tmp_path: Path) -> None:
    """JSON is YAML; what equals timm's default was not given, and is not named."""
    content = {name: option.form.default for name, option in OPTIONS.items() if name != "config"}
    path = tmp_path / "args.yaml"
    path.write_text(json.dumps({**content, "model": "vit_base_patch16_224"}))
    from_file, from_command = converted(str(path), processes=1), converted(VIT)
    assert from_file.config == from_command.config
    assert from_file.lines == from_command.lines


def test_a_file_as_timm_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(
        "batch_size: 64\nlr: 1.0e-03\nmin_lr: 1e-5\nmodel: vit_base_patch16_224\nmodel_kwargs: {depth: 4}\nfuser: te\n"
        "scale:\n- 0.5\n- 1.0\nmixup: 0\nopt_betas: null\namp: true\namp_dtype: float16\nexperiment: photos\n"
    )
    done = converted(str(path), processes=4)
    found = dict(leaves(done.config.model_dump(mode="json")))
    assert found["train.global_batch"] == 256
    assert (found["optimizer.lr"], found["schedule.min_lr"], found["model.kwargs"]) == (1e-3, 1e-5, {"depth": 4})
    assert found["train.precision"] == "bf16", "the file says fp16 because it is timm's default"
    assert any(line.startswith("--fuser te: not kept") for line in done.lines)


def test_a_file_of_defaults_for_a_command(tmp_path: Path) -> None:
    path = tmp_path / "defaults.yaml"
    path.write_text("lr: 0.5\nopt: lamb\n")
    found = values(f"{VIT} --lr 0.25 -c {path}")
    assert (found["optimizer.lr"], found["optimizer.name"]) == (0.25, "lamb")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("lr: abc", "lr = 'abc': not a valid number"),
        ("epochs: 1.5", "epochs = 1.5: not a valid integer"),
        ("amp: 3", "amp = 3: not a valid switch"),
        ("lr_cycle_limit: null", "lr_cycle_limit = None: not a valid integer"),
        ("scale: 3", "scale = 3: must be a list"),
        ("clip_mode: norms", "must be one of norm, value, agc; nearest: norm"),
        ("lrr: 3\nepoch: 2", r"unknown option lrr \(nearest: lr\), epoch \(nearest: epochs\)"),
        ("model_kwargs: {1: 2}", "args.yaml: model_kwargs: 1 is not a name"),
        ("model_kwargs: {t: 2020-01-01}", "args.yaml: model_kwargs.t = 2020-01-01: must be a text, a number"),
        ("opt_kwargs: {betas: [{1: 2}]}", "args.yaml: opt_kwargs.betas = .*must be a text, a number"),
        ("opt_kwargs: {eps: .nan}", "args.yaml: opt_kwargs.eps = nan: must be"),
        ("- lr", "must have a value for each option"),
        ("lr: [", "not valid YAML"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(content: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=part) as raised:
        converted(str(path))
    assert "\n" not in str(raised.value)
