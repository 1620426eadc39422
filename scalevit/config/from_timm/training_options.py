"""timm's options of the optimizer, the schedule and the EMA, in the order of its train.py."""

from scalevit.config.from_timm.option import (
    PAIRS,
    SWITCH,
    integer,
    integers,
    key,
    not_kept,
    number,
    numbers,
    replaced,
    text,
)

_ARGS = "schedule.args"
_PEAK = "optimizer.lr optimizer.lr_base_batch optimizer.lr_scaling"
_LENGTH = "train.epochs schedule.args"
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none")

OPTIMIZER_OPTIONS = (
    key("--opt", text("sgd"), "optimizer.name"),
    replaced("--opt-eps", number(), "optimizer.args", "as `eps`"),
    replaced("--opt-betas", numbers(), "optimizer.args", "as `betas`"),
    replaced("--momentum", number(0.9), "optimizer.args", "as `momentum`, where it is not timm's default"),
    key("--weight-decay", number(2e-5), "optimizer.weight_decay"),
    key("--clip-grad", number(), "optimizer.clip_grad"),
    key("--clip-mode", text("norm", "norm", "value", "agc"), "optimizer.clip_mode", needs="clip_grad"),
    key("--layer-decay", number(), "optimizer.layer_decay"),
    key("--layer-decay-min-scale", number(0), "optimizer.layer_decay_min_scale", needs="layer_decay"),
    key("--layer-decay-no-opt-scale", number(), "optimizer.layer_decay_no_opt_scale", needs="layer_decay"),
    replaced("--opt-kwargs", PAIRS, "optimizer.args", "all of them"),
)

SCHEDULE_OPTIONS = (
    key("--sched", text("cosine", *SCHEDULES), "schedule.name"),
    key(
        "--sched-on-updates",
        SWITCH,
        "schedule.update",
        "step instead of epoch",
        convert=lambda on: "step" if on else "epoch",
    ),
    replaced("--lr", number(), _PEAK, "the peak rate"),
    replaced("--lr-base", number(0.1), _PEAK, "without `--lr`: the rate of `--lr-base-size` images"),
    replaced("--lr-base-size", integer(256), "optimizer.lr_base_batch", "without `--lr`"),
    replaced(
        "--lr-base-scale",
        text(""),
        "optimizer.lr_scaling",
        "without `--lr`; if not given sqrt for optimizers with ada or lamb in their name, else linear, as in timm",
    ),
    replaced("--lr-noise", numbers(), _ARGS, "as `noise`; its seed is that of the run"),
    replaced("--lr-noise-pct", number(0.67), _ARGS, "as `noise_pct`", needs="lr_noise"),
    replaced("--lr-noise-std", number(1.0), _ARGS, "as `noise_std`", needs="lr_noise"),
    replaced("--lr-cycle-mul", number(1.0), _LENGTH, "as `cycle_mul`"),
    replaced("--lr-cycle-decay", number(0.5), _ARGS, "as `cycle_decay`, with several cycles"),
    replaced("--lr-cycle-limit", integer(1), _LENGTH, "as `cycle_limit`; the run has all cycles"),
    replaced("--lr-k-decay", number(1.0), _ARGS, "as `k_decay`"),
    key("--warmup-lr", number(1e-5), "schedule.warmup_lr"),
    key("--min-lr", number(0), "schedule.min_lr"),
    replaced("--epochs", integer(300), "train.epochs", "with warm-up prefix, cycles and cool-down, as timm counts"),
    not_kept("--epoch-repeats", number(0.0), "an epoch is once through the set; give more epochs"),
    not_kept("--start-epoch", integer(), "a run resumes where its own checkpoint ends", neutral=(0,)),
    replaced("--decay-milestones", integers(90, 180, 270), _ARGS, "as `decay_milestones`"),
    replaced("--decay-epochs", number(90), _ARGS, "as `decay_epochs`"),
    replaced("--warmup-epochs", integer(5), "schedule.warmup_epochs", "0 with `--sched none`, which has no warm-up"),
    replaced("--warmup-prefix", SWITCH, _LENGTH, "as `warmup_prefix`"),
    replaced("--cooldown-epochs", integer(0), _LENGTH, "as `cooldown_epochs`"),
    replaced("--patience-epochs", integer(10), _ARGS, "as `patience_epochs`"),
    replaced("--decay-rate --dr", number(0.1), _ARGS, "as `decay_rate`"),
)

EMA_OPTIONS = (
    key("--model-ema", SWITCH, "ema.enabled"),
    not_kept("--model-ema-force-cpu", SWITCH, "the EMA is kept where the weights are", needs="model_ema"),
    key("--model-ema-decay", number(0.9998), "ema.decay", needs="model_ema"),
    key("--model-ema-warmup", SWITCH, "ema.warmup", needs="model_ema"),
)
