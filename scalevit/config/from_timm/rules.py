"""Options that are looked at together, for the keys of model, loss, optimizer, schedule, task and EMA.

Each rule reads the arguments of a conversion and sets keys; `data_rules` has those of the data.
"""

import math
from typing import Any

from scalevit.config.from_timm.conversion import Conversion, ModelFacts, TimmKnowledge
from scalevit.config.from_timm.table import OPTIONS
from scalevit.errors import UserError

_README_SCALE = 0.707
_FP16 = "float16"
_METHODS = {"logit": "logits", "feature": "features", "token": "token"}
_CYCLIC = ("cosine", "tanh", "poly")
_DECAYING = ("wsd", "rsqrt")
_OPTIMIZER_ARGS = {"opt_betas": "betas", "opt_eps": "eps", "momentum": "momentum"}
# Arguments of timm's schedule factory, by the option; those that are its own defaults are left out.
_SCHEDULE_ARGS = {
    "decay_milestones": "decay_milestones",
    "decay_rate": "decay_rate",
    "patience_epochs": "patience_epochs",
    "cooldown_epochs": "cooldown_epochs",
    "warmup_prefix": "warmup_prefix",
    "lr_cycle_mul": "cycle_mul",
    "lr_cycle_limit": "cycle_limit",
    "lr_k_decay": "k_decay",
    "lr_noise": "noise",
}


def model(conversion: Conversion, facts: ModelFacts) -> None:
    """The model's size, classes, weights and arguments, and its reduction.

    Raises:
        UserError: the number of classes is missing.
    """
    arguments = conversion.arguments
    kwargs = dict(arguments["model_kwargs"] or {})
    of_kwargs = kwargs.pop("img_size", None)
    _channels(conversion)
    side = _side(conversion) or arguments["img_size"] or of_kwargs or facts.image_size
    conversion.set("model.image_size", side, "img_size", "input_size", "model_kwargs")
    if arguments["input_size"] is not None:
        conversion.has_no_effect(["img_size"], "beside --input-size")
    if of_kwargs is not None and of_kwargs != side:
        conversion.lines.append(
            f"--model-kwargs img_size={of_kwargs}: not kept: images and model have one size, {side}"
        )
    classes = facts.num_classes if arguments["num_classes"] is None else arguments["num_classes"]
    if arguments["num_classes"] is None and not classes:
        raise UserError(f"--num-classes is missing: timm's {arguments['model']} has no classifier of its own")
    conversion.set("model.num_classes", classes, "num_classes")
    drop_path = facts.drop_path if arguments["drop_path"] is None else arguments["drop_path"]
    conversion.set("model.drop_path", drop_path, "drop_path")
    if arguments["drop"]:
        kwargs["drop_rate"] = arguments["drop"]
    if arguments["gp"]:
        kwargs["global_pool"] = arguments["gp"]
    conversion.set("model.kwargs", kwargs, "model_kwargs", "drop", "gp")
    _weights(conversion)
    _reduction(conversion)


def _channels(conversion: Conversion) -> None:
    """Of the images: those of `--input-size`, else of `--in-chans`, else 3."""
    arguments = conversion.arguments
    source = "in_chans" if arguments["input_size"] is None else "input_size"
    channels = arguments["in_chans"] or 3 if source == "in_chans" else arguments["input_size"][0]
    if source == "input_size":
        conversion.has_no_effect(["in_chans"], "beside --input-size")
    if channels in (1, 3):
        conversion.set("model.in_chans", channels, source)
    else:
        conversion.left_out(OPTIONS[source], "not kept: images have 3 channels, or 1 if they are grey; 3 is taken")


def _side(conversion: Conversion) -> int | None:
    """Of `--input-size`: channels, height and width."""
    size, option = conversion.arguments["input_size"], OPTIONS["input_size"]
    if size is None:
        return None
    if size[1] != size[2]:
        conversion.left_out(option, "not kept: images are squares; the smaller side is taken")
    return int(min(size[1:]))


def _weights(conversion: Conversion) -> None:
    """What the model starts from; timm loads `--initial-checkpoint` last."""
    arguments = conversion.arguments
    checkpoint, path = arguments["initial_checkpoint"], arguments["pretrained_path"]
    if checkpoint or (arguments["pretrained"] and path):
        conversion.set("model.initial_weights", checkpoint or path, "initial_checkpoint", "pretrained_path")
        if checkpoint and arguments["pretrained"]:
            conversion.has_no_effect(("pretrained", "pretrained_path"), "on weights beside --initial-checkpoint")
    elif arguments["pretrained"]:
        conversion.set("model.pretrained", True, "pretrained")


def _reduction(conversion: Conversion) -> None:
    """The paper's one ratio with three meanings."""
    arguments = conversion.arguments
    strategy, ratio = arguments["reduction_strategy"], arguments["reduction_mlp_ratio"]
    conversion.set("reduction.strategy", strategy or "none", "reduction_strategy")
    if strategy == "thin":
        conversion.set("reduction.mlp_ratio", ratio, "reduction_mlp_ratio")
    elif strategy == "shallow":
        conversion.set("reduction.keep", min(ratio, 1.0), "reduction_mlp_ratio")
        if ratio > 1:
            conversion.lines.append(
                f"--reduction-mlp-ratio {ratio:g} (2 if not given) reduces nothing with shallow: reduction.keep=1 too"
            )
    elif strategy == "grouped":
        conversion.set("reduction.group_size", 2, "reduction_strategy")
        conversion.set("reduction.scale", ratio, "reduction_mlp_ratio")
        if ratio == _README_SCALE:
            conversion.set("reduction.scale", 1 / math.sqrt(2))
            conversion.differs("reduction.scale", ratio, "scales shared MLPs by 0.707, here by 1/sqrt(2)")


def loss(conversion: Conversion) -> None:
    """The loss that timm's program chooses."""
    arguments = conversion.arguments
    mixes = bool(arguments["mixup"] > 0 or arguments["cutmix"] > 0 or arguments["cutmix_minmax"] is not None)
    conversion.set("loss.label_smoothing", arguments["smoothing"], "smoothing")
    if arguments["jsd_loss"]:
        conversion.set("loss.name", "jsd", "jsd_loss")
    elif arguments["bce_loss"] and (mixes or arguments["smoothing"]):
        conversion.set("loss.name", "bce", "bce_loss")
        conversion.set("loss.target_threshold", arguments["bce_target_thresh"], "bce_target_thresh")
        conversion.set("loss.sum_classes", arguments["bce_sum"], "bce_sum")
        conversion.set("loss.positive_weight", arguments["bce_pos_weight"], "bce_pos_weight")
        return
    else:
        conversion.set("loss.name", "cross_entropy")
    if arguments["bce_loss"]:
        condition = "without mixing and smoothing, or beside --jsd-loss; loss.name=bce takes it"
        conversion.has_no_effect(("bce_loss", "bce_sum", "bce_target_thresh", "bce_pos_weight"), condition)


def optimizer(conversion: Conversion, timm: TimmKnowledge) -> None:
    """The learning rate and the optimizer's arguments."""
    arguments = conversion.arguments
    args = _optimizer_args(conversion, timm)
    conversion.set("optimizer.args", {**args, **(arguments["opt_kwargs"] or {})}, "opt_kwargs", *_OPTIMIZER_ARGS)
    if arguments["lr"]:
        conversion.set("optimizer.lr", arguments["lr"], "lr")
        conversion.has_no_effect(("lr_base", "lr_base_size", "lr_base_scale"), "beside --lr")
    else:
        name = arguments["opt"].lower()
        scaling = "sqrt" if any(part in name for part in ("ada", "lamb")) else "linear"
        if arguments["lr_base_scale"]:
            scaling = "sqrt" if arguments["lr_base_scale"] == "sqrt" else "linear"
        conversion.set("optimizer.lr", arguments["lr_base"], "lr_base")
        conversion.set("optimizer.lr_base_batch", arguments["lr_base_size"], "lr_base_size")
        conversion.set("optimizer.lr_scaling", scaling, "lr_base_scale")


def _optimizer_args(conversion: Conversion, timm: TimmKnowledge) -> dict[str, Any]:
    """Those of `_OPTIMIZER_ARGS` that are not timm's defaults and that the optimizer has."""
    arguments = conversion.arguments
    given = [name for name in _OPTIMIZER_ARGS if arguments[name] != OPTIONS[name].form.default]
    known = timm.optimizer_arguments(arguments["opt"]) if given else frozenset()
    for name in given:
        if _OPTIMIZER_ARGS[name] not in known:
            conversion.left_out(OPTIONS[name], f"no effect in timm: {arguments['opt']} has no {_OPTIMIZER_ARGS[name]}")
    return {_OPTIMIZER_ARGS[name]: arguments[name] for name in given if _OPTIMIZER_ARGS[name] in known}


def schedule(conversion: Conversion) -> None:
    """The length of the run, and the arguments of timm's schedule where they are not its factory's defaults."""
    arguments = conversion.arguments
    name = arguments["sched"]
    args = {
        argument: arguments[option]
        for option, argument in _SCHEDULE_ARGS.items()
        if arguments[option] != OPTIONS[option].form.default
    }
    # In these the program's defaults are not the factory's.
    if arguments["lr_cycle_limit"] > 1:
        args["cycle_decay"] = arguments["lr_cycle_decay"]
    else:
        conversion.has_no_effect(["lr_cycle_decay"], "with one cycle")
    if name in _DECAYING or arguments["decay_epochs"] != OPTIONS["decay_epochs"].form.default:
        args["decay_epochs"] = arguments["decay_epochs"]
    if arguments["lr_noise"] is not None:
        args |= {"noise_pct": arguments["lr_noise_pct"], "noise_std": arguments["lr_noise_std"]}
        args["noise_seed"] = arguments["seed"]
    conversion.set("schedule.args", args)
    conversion.set("schedule.warmup_epochs", 0 if name == "none" else arguments["warmup_epochs"], "warmup_epochs")
    if name == "none":
        conversion.has_no_effect(["warmup_epochs"], "with --sched none")
    conversion.set("train.epochs", _epochs(conversion), "epochs", "cooldown_epochs", "lr_cycle_limit")


def _epochs(conversion: Conversion) -> int:
    """How long timm's program trains: some schedules add epochs to `--epochs`."""
    arguments = conversion.arguments
    epochs, name = arguments["epochs"], arguments["sched"]
    if name in _CYCLIC:
        cycles, factor = max(1, arguments["lr_cycle_limit"]), arguments["lr_cycle_mul"]
        if factor == 1:
            epochs *= cycles
        else:
            epochs = math.floor(-epochs * (factor**cycles - 1) / (1 - factor))
    if name in (*_CYCLIC, *_DECAYING):
        epochs += arguments["cooldown_epochs"]
    return epochs + (arguments["warmup_epochs"] if arguments["warmup_prefix"] else 0)


def precision(conversion: Conversion) -> None:
    """fp32, or the half-precision type; which one is scalevit's choice where timm's default is not asked for."""
    arguments = conversion.arguments
    conversion.differs("train.matmul_precision", "high", "computes products of fp32 matrices in TF32")
    kind = "fp16" if arguments["amp_dtype"] == _FP16 else "bf16"
    if arguments["model_dtype"] == _FP16:
        conversion.left_out(OPTIONS["model_dtype"], "not kept: weights in fp16 underflow; bfloat16 is kept")
    if arguments["model_dtype"] == "bfloat16":
        conversion.set("train.precision", "bf16-weights", "model_dtype")
        conversion.set("engine.name", "fsdp", "model_dtype")
    elif not arguments["amp"]:
        conversion.set("train.precision", "fp32", "amp")
    elif "amp_dtype" in arguments.given:
        conversion.set("train.precision", kind, "amp_dtype")
    else:
        conversion.set("train.precision", "bf16", "amp")
        conversion.differs("train.precision", "fp16", "computes in fp16 with --amp, here in bf16")


def kernels(conversion: Conversion) -> None:
    """timm's own modules, where its rounding is wanted too."""
    if conversion.exact:
        conversion.set("kernels.mlp", "eager")


def ema(conversion: Conversion) -> None:
    """timm's behaviour, which has no options."""
    arguments = conversion.arguments
    if not arguments["model_ema"]:
        return
    if conversion.exact or arguments["reduction_strategy"] == "grouped":
        conversion.differs("ema.shared_parameters", "per_use", "averages a shared MLP once for each of its blocks")
    conversion.differs("ema.start", "first_step", "starts the EMA from the weights after the first step")
    if conversion.settings["train.precision"] == "fp16":
        conversion.differs("ema.skipped_steps", "average", "updates the EMA at steps whose gradient overflowed")


def compilation(conversion: Conversion) -> None:
    """torch.compile, with the backend and the modes that there are."""
    arguments = conversion.arguments
    backend, mode = arguments["torchcompile"], arguments["torchcompile_mode"]
    if not backend:
        return
    if backend != "inductor":
        conversion.left_out(OPTIONS["torchcompile"], "not kept: blocks are compiled with inductor only")
        return
    conversion.set("train.compile", True, "torchcompile")
    if mode in ("default", "max-autotune-no-cudagraphs"):
        conversion.set("train.compile_mode", mode, "torchcompile_mode")
    elif mode:
        conversion.left_out(OPTIONS["torchcompile_mode"], "not kept: its CUDA graphs keep addresses of weights")


def task(conversion: Conversion) -> None:
    """Distillation."""
    arguments = conversion.arguments
    if arguments["kd_model_name"] is None:
        return
    method = arguments["kd_distill_type"]
    conversion.set("task.name", "distillation", "kd_model_name")
    conversion.set("task.teacher.name", arguments["kd_model_name"], "kd_model_name")
    conversion.set("task.method", _METHODS[method], "kd_distill_type")
    conversion.set("task.temperature", arguments["kd_temperature"], "kd_temperature")
    if method == "token":
        conversion.set("task.hard_targets", arguments["kd_token_distill_type"] == "hard", "kd_token_distill_type")
    else:
        conversion.has_no_effect(["kd_token_distill_type"], "without --kd-distill-type token")
    labels, teacher = arguments["task_loss_weight"], arguments["distill_loss_weight"]
    if teacher is None:
        teacher = 1.0 if labels is None else 1.0 - labels
    conversion.set("task.label_weight", 1.0 if labels is None else labels, "task_loss_weight")
    conversion.set("task.distillation_weight", teacher, "distill_loss_weight")
