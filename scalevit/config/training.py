"""The sections of the training loop: optimizer, schedule, checkpoints, EMA, evaluation. Plain settings."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from scalevit.config.base import (
    ClipMode,
    CompileMode,
    FilePath,
    MatmulPrecision,
    NonNegativeFloat,
    NonNegativeInt,
    Precision,
    Section,
    SelectionMetric,
    UnitInterval,
)


class OptimizerConfig(Section):
    """An optimizer built by timm's factory (`timm.optim.create_optimizer_v2`) with timm's parameter groups."""

    name: str = "adamw"
    """timm's name of the optimizer, for example adamw, sgd, lion, lamb, nadamw or adan."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate, of `lr_base_batch` images per step where that is given."""
    lr_base_batch: PositiveInt | None = None
    """Global batch that `lr` is meant for: with another `train.global_batch` the rate is scaled, as by timm's
    `--lr-base` and `--lr-base-size`. null: `lr` is not scaled."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """Whether the rate grows with the batch or with its square root (timm's choice for Adam's kind and LAMB)."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay. Biases, norms, tokens and position embeddings are not decayed (timm's groups)."""
    args: dict[str, Any] = {}
    """Further arguments of the optimizer, for example {"betas": [0.9, 0.95], "eps": 1e-8} or {"momentum": 0.9}."""
    clip_grad: PositiveFloat | None = None
    """Limit of the gradient, in the way of `clip_mode`; null does not clip."""
    clip_mode: ClipMode = "norm"
    """norm: maximum global norm of the gradients; value: maximum of each element; agc: adaptive clipping
    (arXiv:2102.06171), maximum norm of each row of a gradient over that of its weights, the classifier left out as in
    timm (every engine but ZeRO stages 1 to 3)."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """For fine-tuning: the learning rate of a layer is that of the layer above it times this (timm's layers:
    embedding, blocks, classifier). null: one learning rate for all, as in the paper."""
    layer_decay_min_scale: UnitInterval = 0.0
    """Lower bound of a layer's learning rate as a fraction of `lr`."""
    layer_decay_no_opt_scale: UnitInterval | None = None
    """Layers whose learning rate would be below this fraction of `lr` are not trained at all (timm's option of this
    name); null trains all."""
    layer_decay_shared: Literal["first", "mean", "last"] = "first"
    """Learning rate of an MLP that several blocks share: that of the first of them (timm's choice, the smallest), of
    the last, or the mean over them."""
    frozen: Literal["backbone"] | tuple[str, ...] | None = None
    """Parameters that are not trained. backbone: all but the classifier (a linear probe); or a list of names of modules
    and parameters with * and ?, for example ["patch_embed", "pos_embed", "blocks.[0-3]"]. null trains all."""

    @property
    def used_clip_mode(self) -> ClipMode:
        """How gradients are clipped, if they are; every engine can do without."""
        return "norm" if self.clip_grad is None else self.clip_mode

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate that the schedule starts from, with this number of images per step."""
        if self.lr_base_batch is None:
            return self.lr
        ratio = global_batch / self.lr_base_batch
        return self.lr * (ratio**0.5 if self.lr_scaling == "sqrt" else ratio)


class ScheduleConfig(Section):
    """A learning rate schedule built by timm's factory (`timm.scheduler.create_scheduler_v2`) over `train.epochs`."""

    name: str = "cosine"
    """timm's name of the schedule: cosine, step, multistep, poly, tanh, wsd, rsqrt, constant, none, or plateau, which
    lowers the rate when `evaluation.metric` no longer improves (that of the EMA, if enabled)."""
    warmup_epochs: NonNegativeFloat = 5
    """Epochs of linear warm-up; must be fewer than `train.epochs`."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at the start of the warm-up (timm's default)."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule."""
    update: Literal["epoch", "step"] = "epoch"
    """Whether the learning rate changes once per epoch (timm's default) or at every step."""
    args: dict[str, Any] = {}
    """Further arguments of timm's factory: decay_rate, decay_epochs, decay_milestones, cooldown_epochs,
    patience_epochs, warmup_prefix, cycle_mul, cycle_decay, cycle_limit, k_decay, noise and others. Those that add
    epochs (cool-down, warm-up prefix, cycles) shorten the schedule, so that it ends with the run."""


class CheckpointConfig(Section):
    """When the complete state of the run is saved, and which checkpoints are kept."""

    every_epochs: PositiveInt | None = 1
    """Epochs between checkpoints; null saves none at the end of an epoch."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints, in addition to those of `every_epochs`; null saves none."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the best `evaluation.metric` (of the EMA, if enabled) of those evaluated."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written. In both cases each rank needs host memory for a copy of its
    part of the state."""


class TrainConfig(Section):
    """The training loop. Gradient accumulation follows from global_batch, micro_batch and the number of ranks."""

    epochs: PositiveInt = 300
    """Length of the run and of the learning rate schedule."""
    max_steps: PositiveInt | None = None
    """Stop after this number of optimizer steps; the schedule still spans all epochs. null trains all epochs."""
    global_batch: PositiveInt = 1024
    """Images per optimizer step, over all ranks. Any number of ranks can share it; rows of weight 0 fill up."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of images per forward pass on one rank. Results do not depend on it. auto: the largest that fits
    on a GPU, found once per run and kept in the run folder; 64 on a CPU."""
    precision: Precision = "bf16"
    """bf16, fp16: automatic mixed precision with fp32 weights (fp16 with loss scaling); fp32: full precision;
    bf16-weights: weights and optimizer state in bf16 too, as timm's `--model-dtype` (FSDP2 only): less memory, but
    small updates are lost."""
    matmul_precision: MatmulPrecision = "highest"
    """Of products of fp32 matrices on a GPU, as `torch.set_float32_matmul_precision`. highest: fp32; high: TF32, as
    timm's trainer; medium: bf16. Matters with `precision=fp32`, and where autocast leaves a product in fp32."""
    channels_last: bool = True
    """Pass images to the model in the channels-last memory format."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass (non-reentrant): less memory, about a third more compute."""
    compile: bool = False
    """Compile each block with torch.compile. Apart from rounding, results do not depend on it."""
    compile_mode: CompileMode = "default"
    """torch.compile's mode; max-autotune-no-cudagraphs tries several kernels for each product first. The modes with
    CUDA graphs are left out: graphs keep addresses, which sharded weights change."""
    meta_init: bool = False
    """Initialise each shard separately, for models larger than the memory of a host; needs FSDP2 or ZeRO stage 3. The
    initial values follow timm's distributions but differ from those of the same seed without it."""
    resume: Literal["auto"] | bool = "auto"
    """auto: resume from the newest intact checkpoint of this run, if there is one. true: a checkpoint must exist.
    false: start a new run; a run folder that has checkpoints is an error."""
    resume_changes: Literal["refuse", "allow"] | tuple[str, ...] = "refuse"
    """Settings that may differ from those of the checkpoint although the run's results depend on them: optimizer,
    schedule, loss, task, EMA, augmentation, validation set, drop-path, epochs. refuse: none; allow: all; or a list of
    keys or sections, e.g. `["optimizer.lr"]`. Every change is listed, and recorded in the run folder."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: PositiveInt = 50
    """Optimizer steps between training records in metrics.jsonl and the trackers."""
    profile: bool = False
    """Write a profiler trace and, on CUDA, a memory snapshot of a few steps for each rank into
    `runs/NAME/profile/steps_FIRST_LAST/`."""
    profile_after: NonNegativeInt = 10
    """Steps of this process before the profiled ones, as warm-up."""
    profile_steps: PositiveInt = 3
    """Number of profiled steps."""


class EmaConfig(Section):
    """Exponential moving average of the weights, in fp32."""

    enabled: bool = True
    """Keep an average of the weights; it is evaluated and saved like the weights."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9998
    """Weight of the previous average at each step; 0.9998 averages over about 5,000 steps."""
    shared_parameters: Literal["once", "per_use"] = "once"
    """once: every parameter is averaged once per step. per_use: a shared MLP is averaged once for each block that
    uses it (in groups of two its decay is squared), as timm's ModelEmaV3 does and as in the paper's runs."""
    warmup: bool = False
    """Smaller decay at first (timm's): 1 - (1 + n / warmup_gamma) ** -warmup_power after n steps, at most `decay`."""
    warmup_gamma: PositiveFloat = 1.0
    """Steps that stretch the warm-up."""
    warmup_power: PositiveFloat = 2 / 3
    """2/3 reaches a decay of 0.999 after 31,600 steps, 3/4 after 10,000."""
    start: Literal["initial", "first_step"] = "initial"
    """The weights that the average starts from: the initial ones, or those after the first step, as timm's trainer."""
    skipped_steps: Literal["ignore", "average"] = "ignore"
    """Whether the average also follows at steps that are skipped because their gradient overflowed, as in timm."""


class EvaluationConfig(Section):
    """Top-1 and top-5 of the weights and of the EMA over the validation images, each exactly once."""

    every_epochs: PositiveInt = 1
    """Epochs between evaluations; the end of the run is always evaluated."""
    batch: PositiveInt = 256
    """Images per forward pass on one rank. Results do not depend on it."""
    metric: SelectionMetric = "top1"
    """What the best epoch, weights and checkpoint are chosen by: the highest top-1 or top-5, or the lowest loss."""
    examples: Annotated[int, Field(ge=0, le=100)] = 12
    """Validation images that the run's page shows with their predictions, and as many of the surest mistakes. They are
    stored in the run folder, at most 96 pixels wide; 0 stores none."""
    real_labels: FilePath | None = None
    """JSON file of reassessed labels (arXiv:2006.07159, `real.json`): a list with the list of labels of each image of
    ImageNet's validation set in its own order, or an object with that of each image by its key. Adds the metrics
    `real_top1` and `real_top5`, over the images that have such labels."""
