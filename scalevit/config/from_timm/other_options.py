"""timm's options of logging and checkpoints, image sizes, NaFlex and distillation; then those of the paper's copy."""

from scalevit.config.from_timm.option import (
    SWITCH,
    Form,
    integer,
    integers,
    key,
    machine,
    not_kept,
    not_needed,
    not_supported_yet,
    number,
    numbers,
    replaced,
    text,
)

_CONSTANT_BATCH = "the global batch is constant: the order of the images follows from it"
_NAFLEX = "images are squares of one size, not sequences of patches"
_WEIGHTS = "task.label_weight task.distillation_weight"
_BOTH = "both weights are 1 if neither is given; the label weight only: the other is 1 minus it"

OTHER_OPTIONS = (
    key("--seed", integer(42), "seed"),
    not_needed("--worker-seeding", text("all"), "draws do not depend on the workers"),
    machine("--log-interval", integer(50), "train.log_every_steps"),
    replaced(
        "--val-interval",
        integer(1),
        "evaluation.every_epochs train.checkpoint.every_epochs",
        "a checkpoint after each evaluation, as in timm",
    ),
    machine("--recovery-interval", integer(0), "train.checkpoint.every_steps", convert=lambda steps: steps or None),
    machine(
        "--checkpoint-hist",
        integer(10),
        "train.checkpoint.keep",
        "the newest ones, and the best one besides; timm keeps the best ones",
    ),
    machine("-j --workers", integer(4), "data.workers", "of each process; results do not depend on it"),
    not_kept("--save-images", SWITCH, "`scalevit shards show` draws the images that a run gets"),
    not_needed("--pin-mem", SWITCH, "memory is pinned on GPUs"),
    replaced(
        "--no-prefetcher",
        SWITCH,
        "data.augmentation.erase",
        "erasing before mixing, scalevit's default; with the prefetcher after it, which `--exact` writes",
    ),
    machine("--output", text(""), "output_dir"),
    machine("--experiment", text(""), "name"),
    key("--eval-metric", text("top1"), "evaluation.metric", only=("top1", "top5", "loss")),
    not_kept("--tta", integer(0), "evaluations take one view of each image"),
    not_needed("--use-multi-epochs-loader", SWITCH, "loader processes live as long as the run"),
    key("--log-wandb", SWITCH, "tracking.wandb.enabled"),
    key(
        "--wandb-project",
        text(),
        "tracking.wandb.project",
        convert=lambda name: name or "scalevit",
        needs="log_wandb",
    ),
    key("--wandb-tags", Form("text", [], nargs="+"), "tracking.wandb.tags", needs="log_wandb"),
    not_needed("--wandb-resume-id", text(""), "a resumed run finds its wandb run", needs="log_wandb"),
)

SIZE_OPTIONS = (
    key("--train-img-sizes", integers(), "data.augmentation.image_sizes", convert=lambda sizes: sizes or []),
    not_supported_yet("--train-batch-sizes", integers(), _CONSTANT_BATCH, needs="train_img_sizes"),
    key("--train-size-probs", numbers(), "data.augmentation.image_size_probs", needs="train_img_sizes"),
    key(
        "--train-size-schedule",
        text("constant", "constant", "progressive"),
        "data.augmentation.image_size_schedule",
        needs="train_img_sizes",
    ),
    key(
        "--train-size-schedule-spread",
        number(0.65),
        "data.augmentation.image_size_spread",
        needs="train_img_sizes",
    ),
    key(
        "--train-size-random-mix",
        number(0.1),
        "data.augmentation.image_size_random_mix",
        needs="train_img_sizes",
    ),
    not_supported_yet(
        "--train-batches-per-epoch --train-steps-per-epoch",
        integer(),
        "an epoch has as many steps as the set fills; `train.max_steps` ends a run early",
    ),
    not_supported_yet(
        "--variable-batch-loss-scale", text("none", "none", "sqrt", "linear"), _CONSTANT_BATCH, needs="train_img_sizes"
    ),
)

NAFLEX_OPTIONS = (
    not_supported_yet("--naflex-loader", SWITCH, _NAFLEX),
    not_supported_yet("--naflex-train-seq-lens", integers(128, 256, 576, 784, 1024), _NAFLEX, needs="naflex_loader"),
    not_supported_yet("--naflex-max-seq-len", integer(576), _NAFLEX, needs="naflex_loader"),
    not_supported_yet("--naflex-patch-sizes", integers(), _NAFLEX, needs="naflex_loader"),
    not_supported_yet("--naflex-patch-size-probs", numbers(), _NAFLEX, needs="naflex_loader"),
    not_supported_yet("--naflex-loss-scale", text("linear", "none", "sqrt", "linear"), _NAFLEX, needs="naflex_loader"),
    not_supported_yet("--naflex-patchify-channels-first", SWITCH, _NAFLEX, needs="naflex_loader"),
)

DISTILLATION_OPTIONS = (
    replaced("--kd-model-name", text(), "task.name task.teacher.name", "distillation from timm's pretrained model"),
    replaced(
        "--kd-distill-type",
        text("logit", "logit", "feature", "token"),
        "task.method",
        "logits, features or token",
        needs="kd_model_name",
    ),
    not_kept("--kd-loss-type", text("kl"), "timm has kl only", needs="kd_model_name"),
    replaced("--distill-loss-weight", number(), _WEIGHTS, _BOTH, needs="kd_model_name"),
    replaced("--task-loss-weight", number(), _WEIGHTS, _BOTH, needs="kd_model_name"),
    replaced("--kd-temperature", number(4.0), "task.temperature", "of logits and token", needs="kd_model_name"),
    not_needed("--kd-student-feature-dim", integer(), "is read from the model", needs="kd_model_name"),
    not_needed("--kd-teacher-feature-dim", integer(), "is read from the model", needs="kd_model_name"),
    replaced(
        "--kd-token-distill-type",
        text("soft", "soft", "hard"),
        "task.hard_targets",
        "with `--kd-distill-type token`",
        needs="kd_model_name",
    ),
)

CONFIG_OPTIONS = (
    replaced("-c --config", text(""), "", "its values take the place of timm's defaults; the command line overrides"),
)

PAPER_OPTIONS = (
    replaced(
        "--reduction-strategy",
        text(None, "thin", "shallow", "grouped"),
        "reduction.strategy",
        "none without it",
        paper=True,
    ),
    replaced(
        "--reduction-mlp-ratio",
        number(2.0),
        "reduction.mlp_ratio reduction.keep reduction.scale",
        "`mlp_ratio` of thin, `keep` of shallow (at most 1), `scale` of grouped, where 0.707 is 1/sqrt(2)",
        needs="reduction_strategy",
        paper=True,
    ),
    not_kept("--amp-impl", text("native"), "mixed precision is torch's own; apex is not used", needs="amp", paper=True),
)
