"""timm's options of the data set, the model and the device, in the order of its train.py."""

from scalevit.config.from_timm.option import (
    PAIRS,
    SWITCH,
    Form,
    integer,
    key,
    machine,
    not_kept,
    not_needed,
    number,
    numbers,
    replaced,
    text,
)

_PATHS = "data.train data.validation"
_SHARDS = "the images are written as shards once: the command is printed"
_CHANNELS = "3 for RGB, 1 for grey images; others are not kept"
_NEW_HEAD = "of a classifier that is newly initialised; timm changes a loaded one too"
_BATCH = "images of each process and pass, times the processes, times the steps of accumulation"


def _list_of_three(values: list[float] | None) -> list[float] | None:
    """timm takes one value for all channels."""
    return values * 3 if values is not None and len(values) == 1 else values


DATA_OPTIONS = (
    replaced("data", text(), _PATHS, f"as `--data-dir`: {_SHARDS}"),
    replaced("--data-dir", text(), _PATHS, f"folder of shards for `--dataset wds/...`; else {_SHARDS}"),
    replaced("--dataset", text(""), _PATHS, f"`wds/...` are shards already; else {_SHARDS}"),
    replaced("--train-split", text("train"), "data.train", "a pattern of shards, or a part of the data set"),
    replaced(
        "--val-split", text("validation"), "data.validation", "likewise; a run without validation images is not kept"
    ),
    not_needed("--train-num-samples", integer(), "the index counts the images of the shards"),
    not_needed("--val-num-samples", integer(), "the index counts the images of the shards"),
    not_kept("--dataset-download", SWITCH, "nothing is downloaded: write the data set as shards"),
    replaced("--class-map", text(""), "data.class_names", "a .txt file of names; a pickled dictionary is not kept"),
    not_kept(
        "--input-img-mode", text(), "it follows from the channels: RGB, or L for one channel", neutral=("RGB", "L")
    ),
    not_needed("--input-key", text(), "images are found by their suffix; columns are named when shards are written"),
    replaced(
        "--target-key",
        text(),
        "data.label_key",
        "the key in `.json` members of `wds/...`, used where there are no `.cls` members; of a data set with columns "
        "it is in the printed command",
    ),
    not_kept("--dataset-trust-remote-code", SWITCH, "no code of a data set is run"),
)

MODEL_OPTIONS = (
    key("--model", text("resnet50"), "model.name", "models with batch norms, such as timm's default, are not trained"),
    replaced(
        "--pretrained", SWITCH, "model.pretrained", "unless `--initial-checkpoint` or `--pretrained-path` names weights"
    ),
    replaced(
        "--pretrained-path", text(), "model.initial_weights", "with `--pretrained`, as in timm", needs="pretrained"
    ),
    replaced(
        "--initial-checkpoint", text(""), "model.initial_weights", "timm's `.pth.tar` too; the EMA where there is one"
    ),
    not_kept("--resume", text(""), "runs resume from their own checkpoints; `--initial-checkpoint` takes the weights"),
    not_kept("--no-resume-opt", SWITCH, "runs resume from their own checkpoints", needs="resume"),
    replaced("--num-classes", integer(), "model.num_classes", "that of the timm model if not given"),
    replaced("--gp", text(), "model.kwargs", "as `global_pool`"),
    replaced("--img-size", integer(), "model.image_size", "that of the timm model if not given"),
    replaced("--in-chans", integer(), "model.in_chans", _CHANNELS),
    replaced(
        "--input-size",
        Form("integer", nargs=3),
        "model.image_size model.in_chans",
        "the channels and the side of a square; other shapes are not kept",
    ),
    key("--crop-pct", number(), "data.crop_pct"),
    key("--mean", numbers(), "data.mean", convert=_list_of_three),
    key("--std", numbers(), "data.std", convert=_list_of_three),
    key("--interpolation", text(""), "data.interpolation", "of evaluations", convert=lambda name: name or None),
    replaced(
        "-b --batch-size",
        integer(128),
        "train.global_batch data.augmentation.mixing_group",
        f"{_BATCH}; with `--exact` also `train.micro_batch` and `evaluation.batch`",
    ),
    machine("-vb --validation-batch-size", integer(), "evaluation.batch", "results do not depend on it"),
    key("--channels-last", SWITCH, "train.channels_last"),
    not_kept("--fuser", text(""), "TorchScript's fusers are not used; `train.compile` compiles the blocks"),
    replaced("--grad-accum-steps", integer(1), "train.global_batch", _BATCH),
    key("--grad-checkpointing", SWITCH, "train.activation_checkpointing"),
    not_kept("--fast-norm", SWITCH, "norms are computed in the precision of torch's autocast"),
    replaced("--model-kwargs", PAIRS, "model.kwargs model.image_size", "`img_size` is the image size"),
    key("--head-init-scale", number(), "model.head_init_scale", _NEW_HEAD),
    key("--head-init-bias", number(), "model.head_init_bias", _NEW_HEAD),
    replaced(
        "--torchcompile-mode",
        text(),
        "train.compile_mode",
        "default and max-autotune-no-cudagraphs; modes with CUDA graphs are not kept",
        needs="torchcompile",
    ),
    not_kept("--torchscript", SWITCH, "TorchScript is not used; `train.compile` compiles the blocks"),
    replaced(
        "--torchcompile",
        Form("text", nargs="?", const="inductor"),
        "train.compile",
        "with inductor; other backends are not kept",
    ),
)

DEVICE_OPTIONS = (
    not_needed("--device", text("cuda"), "a GPU is used where there is one, else the CPU"),
    replaced("--amp", SWITCH, "train.precision", "bf16, with `--exact` timm's fp16; without it fp32"),
    replaced(
        "--amp-dtype",
        text("float16", "float16", "bfloat16"),
        "train.precision",
        "kept where it is given",
        needs="amp",
    ),
    replaced(
        "--model-dtype",
        text(None, "float32", "float16", "bfloat16"),
        "train.precision engine.name",
        "bfloat16: bf16-weights, with FSDP2; float16 is not kept",
        neutral=("float32",),
    ),
    not_needed("--no-ddp-bb", SWITCH, "the models have no buffers that ranks could differ in"),
    not_needed("--synchronize-step", SWITCH, "timings are taken without it"),
    not_needed("--local_rank", integer(0), "the launcher's variables give the rank"),
    not_kept(
        "--device-modules", Form("text", nargs="+"), "no modules are imported by name; torch's own devices are used"
    ),
)
