"""The loop: optimizer, schedule, checkpoints, EMA and evaluation."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from scalevit.config.base import NonNegativeFloat, NonNegativeInt, Section


class OptimizerConfig(Section):
    """An optimizer of timm's factory (`timm.optim.create_optimizer_v2`), with timm's no-decay groups."""

    name: str = "adamw"
    """timm's name of the optimizer, for example adamw, sgd, lion, lamb, nadamw, adan."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate, for the global batch as configured."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay; biases, norms, tokens and position embeddings have none (timm's groups)."""
    args: dict[str, Any] = {}
    """More arguments of that optimizer, for example {"betas": [0.9, 0.95], "eps": 1e-8} or {"momentum": 0.9}."""
    clip_grad_norm: PositiveFloat | None = None
    """Global norm that gradients are clipped to; null does not clip."""


class ScheduleConfig(Section):
    """A learning rate schedule of timm's factory (`timm.scheduler.create_scheduler_v2`) over `train.epochs`."""

    name: str = "cosine"
    """timm's name of the schedule."""
    warmup_epochs: NonNegativeFloat = 5
    """Epochs of linear warm-up."""
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at the first step of the warm-up (timm's default)."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end."""
    update: Literal["epoch", "step"] = "epoch"
    """How often the learning rate changes: timm's default is once per epoch."""
    args: dict[str, Any] = {}
    """More arguments of timm's factory, for example {"decay_rate": 0.5, "cooldown_epochs": 10}."""


class CheckpointConfig(Section):
    """When the whole state of the run is saved."""

    every_epochs: PositiveInt | None = 1
    every_steps: PositiveInt | None = None
    """Also every so many optimizer steps."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: bool = True
    """Also keep the checkpoint with the best top-1 (of the EMA, where there is one), of those that were evaluated."""
    asynchronous: bool = True
    """Train on while a checkpoint is written. Either way each rank needs host memory for two copies of its part."""


class TrainConfig(Section):
    """The loop. Gradient accumulation follows: global_batch = micro_batch x ranks x accumulation."""

    epochs: PositiveInt = 300
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, with the schedule still laid out for all epochs."""
    global_batch: PositiveInt = 1024
    """Images per optimizer step over all ranks."""
    micro_batch: PositiveInt = 256
    """Images per forward pass on one rank. Mixup mixes within it, so the run's numbers depend on it but not on the
    number of ranks."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """bf16 and fp16 are automatic mixed precision over fp32 weights; fp16 scales its loss."""
    channels_last: bool = True
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass (non-reentrant)."""
    compile: bool = False
    """torch.compile each block. Drop-path and dropout then draw other numbers than without."""
    meta_init: bool = False
    """Initialise shard by shard, for models that do not fit into a host's memory, with FSDP2 or ZeRO stage 3. The
    initial values then have timm's distributions but are not those of the same seed without."""
    resume: Literal["auto"] | bool = "auto"
    """auto: go on from the newest checkpoint of this run if there is one; true: there must be one; false: start
    anew, and refuse a run folder that has checkpoints."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: PositiveInt = 50
    """Steps between lines of metrics.jsonl."""
    profile: bool = False
    """Write a trace and, on CUDA, a memory snapshot of some steps into `runs/NAME/profile/`, for each rank."""
    profile_after: NonNegativeInt = 10
    """So many steps of this process come before the profiled ones, for warming up."""
    profile_steps: PositiveInt = 3
    """How many steps are profiled."""


class EmaConfig(Section):
    """Exponential moving average of the weights, in fp32."""

    enabled: bool = True
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9998
    shared_parameters: Literal["once", "per_use"] = "once"
    """once: every unique parameter decays by `decay`. per_use reproduces timm's ModelEmaV3, which updates a shared
    MLP once for each block that uses it (decay squared in pairs), as in the paper's runs."""


class EvaluationConfig(Section):
    """Top-1 and top-5 of the weights and of the EMA, every validation image exactly once."""

    every_epochs: PositiveInt = 1
    batch: PositiveInt = 256
    """Images per forward pass on one rank."""
