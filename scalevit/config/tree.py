"""The config tree: every setting of a run, its type, its default and its meaning.

The defaults are the paper's recipe (arXiv:2512.01059) for ViT-B/16 on ImageNet-1k. Files, `extends` and
command-line overrides are read by `scalevit.config.loading`; this module only says what a valid config is.
Nothing here imports torch, so that a mistake is reported before any process group starts.
"""

import difflib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
FilePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


# --- model ------------------------------------------------------------------------------------------------


class ModelConfig(Section):
    """Which timm Vision Transformer is trained."""

    name: str = "vit_base_patch16_224"
    """A model of timm's registry whose blocks carry timm's Mlp (ViT, DeiT III, DINOv2-like)."""
    image_size: PositiveInt = 224
    """Side of the square input in pixels."""
    num_classes: PositiveInt = 1000
    """Number of classes; every label must be below it."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first."""
    initial_weights: FilePath | None = None
    """A `model.safetensors` (ours, reduced or not) or a plain timm state dict to start from. Whether it is already
    reduced is read from the file, so it is never reduced twice."""
    kwargs: dict[str, Any] = {}
    """More arguments of the timm factory, for example {"embed_dim": 96, "depth": 6}."""


class NoReduction(Section):
    """The unchanged model."""

    strategy: Literal["none"] = "none"


class GroupedReduction(Section):
    """GroupedMLP: the blocks of a group share one MLP, that of the group's first block."""

    strategy: Literal["grouped"] = "grouped"
    group_size: Annotated[int, Field(ge=2)] | None = None
    """How many neighbouring blocks share an MLP (2 when neither this nor `groups` is given). The depth must be a
    multiple of it."""
    groups: list[Annotated[list[NonNegativeInt], Field(min_length=1)]] | None = None
    """Explicit groups of block indices, for example [[0, 1], [2, 3, 4]]; blocks not named keep their own MLP."""
    scale: PositiveFloat = 1 / math.sqrt(2)
    """Factor on the shared `fc1.weight`, `fc1.bias` and `fc2.weight` at initialisation (the paper's 1/sqrt(2))."""

    @model_validator(mode="after")
    def _one_grouping(self) -> "GroupedReduction":
        if self.group_size is not None and self.groups is not None:
            raise ValueError("give group_size or groups, not both")
        return self


class ShallowReduction(Section):
    """ShallowMLP: each MLP keeps the first part of its hidden units; everything else keeps its initialisation."""

    strategy: Literal["shallow"] = "shallow"
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the hidden units that is kept: int(keep * hidden) of them."""
    choose: Literal["first", "importance"] = "first"
    """first keeps the first units (the paper); importance those with the largest weights, for pretrained models."""


class ThinReduction(Section):
    """ThinMLP: the model is built with a narrower MLP."""

    strategy: Literal["thin"] = "thin"
    mlp_ratio: PositiveFloat = 2.0
    """Hidden width over embedding width, given to the timm factory."""


Reduction = Annotated[
    NoReduction | GroupedReduction | ShallowReduction | ThinReduction, Field(discriminator="strategy")
]


class KernelsConfig(Section):
    """How the MLPs are computed."""

    mlp: Literal["auto", "triton", "eager"] = "auto"
    """auto: fused Triton kernels where they run, else PyTorch; triton: fail where they do not; eager: PyTorch."""
    save: Literal["fast", "lean", "recompute"] = "fast"
    """What the fused forward keeps for the backward: 4, 2 or 0 bytes per hidden unit and token in bf16."""


# --- data -------------------------------------------------------------------------------------------------


class AugmentationConfig(Section):
    """What happens to a training image; the defaults are timm's plus the paper's."""

    repeats: PositiveInt = 3
    """Augmented copies of each decoded image (repeated augmentation); an epoch stays as many images long."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Area of the random crop relative to the image."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Fraction = 0.4
    """Strength of colour jitter; not used where auto_augment is (timm's rule)."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment / AutoAugment policy, or null."""
    interpolation: Literal["random", "bilinear", "bicubic"] = "random"
    """Resampling of the training crop; random draws bilinear or bicubic."""
    random_erasing: Fraction = 0.25
    """Probability of erasing a rectangle (timm's pixel mode)."""
    mixup: NonNegativeFloat = 0.8
    """Alpha of mixup's Beta distribution; 0 turns it off."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha of CutMix; with both on, each batch takes one of the two."""
    mix_probability: Fraction = 1.0
    """Probability that a batch is mixed at all."""

    @model_validator(mode="after")
    def _ranges(self) -> "AugmentationConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}]: the first must not be above the second")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale = {list(self.crop_scale)}: a crop has at most the image's area (1.0)")
        return self


class DataConfig(Section):
    """Where the WebDataset shards are and how images become tensors."""

    train: FilePath = "data/imagenet/train"
    """Training shards: a folder of .tar files, or a pattern with * or {000..146}."""
    validation: FilePath = "data/imagenet/validation"
    """Validation shards, likewise."""
    embedded: Literal["digits"] | None = None
    """digits: write scikit-learn's handwritten digits as shards to those folders when they are missing."""
    workers: NonNegativeInt = 8
    """Loader processes per rank; 0 loads in the training process. The order does not depend on it."""
    transforms: Literal["timm", "fast"] = "timm"
    """timm: its own transforms; fast: the same recipe with the resize in torch (pixels within one level of timm's) and
    the augmentation in numpy. With both, normalisation and random erasing happen on the device."""
    label_key: str = "label"
    """Key of the label in `.json` members; `.cls` and `.txt` need none."""
    max_faults: NonNegativeInt = 100
    """So many bad samples may a run have, of training and validation together. They are listed in
    `runs/NAME/data_faults.jsonl`; in training others are shown in their place, in evaluation they count as wrong."""
    stream_samples: PositiveInt | None = None
    """Read the training shards as a stream, so many samples an epoch: for `pipe:` commands and servers that give no
    ranges. A stream is not exactly resumable, has no repeats, and needs a shard per worker; null reads at any place."""
    cache: str | None = None
    """Folder on each node for chunks of shards at an address (s3://, gs://, https://, ...); null fetches every sample
    by itself."""
    cache_gb: PositiveFloat | None = None
    """Most gigabytes in that folder; null for no limit. `scalevit shards plan` tells how much is needed."""
    mean: tuple[Fraction, Fraction, Fraction] | None = None
    """Per-channel mean of the normalisation; null takes the timm model's own."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Per-channel standard deviation; null takes the timm model's own."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Evaluation: central crop over resized side; null takes the timm model's own."""
    augmentation: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _embedded_goes_to_folders(self) -> "DataConfig":
        for name in ("train", "validation"):
            path = getattr(self, name)
            if self.embedded and (path.endswith(".tar") or "://" in path or set(path) & set("*?[]{}")):
                raise ValueError(f"{name} = {path!r}: embedded data are written to a plain folder")
        return self


# --- training ---------------------------------------------------------------------------------------------


class OptimizerConfig(Section):
    """AdamW with timm's no-decay groups under a cosine schedule with linear warm-up."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate, for the global batch as configured."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay; biases, norms, tokens and position embeddings have none (timm's groups)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    warmup_epochs: NonNegativeFloat = 5
    warmup_lr: NonNegativeFloat = 1e-5
    """Learning rate at the first step of the warm-up (timm's default)."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""
    lr_changes: Literal["epoch", "step"] = "epoch"
    """How often the schedule moves: timm's default is once per epoch."""
    clip_grad_norm: PositiveFloat | None = None
    """Global norm that gradients are clipped to; null does not clip."""


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
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
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
    shared_updates_per_step: Literal["once", "per_use"] = "once"
    """once: every unique parameter decays by `decay`. per_use reproduces timm's ModelEmaV3, which updates a shared
    MLP once for each block that uses it (decay squared in pairs), as in the paper's runs."""


class EvaluationConfig(Section):
    """Top-1 and top-5 of the weights and of the EMA, every validation image exactly once."""

    every_epochs: PositiveInt = 1
    batch: PositiveInt = 256
    """Images per forward pass on one rank."""


# --- engines and tracking ---------------------------------------------------------------------------------


# Native DeepSpeed settings that follow from other keys of this config.
_SET_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "zero_force_ds_cpu_optimizer": "engine.offload_optimizer",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer and engine.nvme_path",
    "zero_optimization.offload_param": "engine.offload_parameters and engine.nvme_path",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload_parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "engine.offload_optimizer",
    "compile": "train.compile",
    "wandb": "the tracking section",
}
# What DeepSpeed reads at the top level of its config; it ignores any other name in silence.
_NATIVE_SETTINGS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "data_types",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "csv_monitor",
    "comet",
    "timers",
)


class DeepSpeedConfig(Section):
    """DeepSpeed ZeRO."""

    name: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 1
    """0 replicates; 1 shards the optimizer state, 2 the gradients too, 3 the parameters too."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward goes on; null leaves it to DeepSpeed (at stage 3 yes, else no)."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer state lies and steps, from stage 1 on; nvme at stage 3 alone."""
    offload_parameters: Literal["cpu", "nvme"] | None = None
    """Where sharded parameters lie while they are not in use, at stage 3."""
    nvme_path: FilePath | None = None
    """Folder on each node's NVMe for what is offloaded to nvme."""
    deepspeed: dict[str, Any] = {}
    """Native DeepSpeed settings, merged into ours; what another key of this config sets may not appear here."""

    @property
    def offloads(self) -> bool:
        """Whether parameters lie in the CPU's memory."""
        return self.offload_parameters is not None

    @model_validator(mode="after")
    def _no_conflicts(self) -> "DeepSpeedConfig":
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("deepspeed.zero_optimization must be a section")
        for key in [*self.deepspeed, *(f"zero_optimization.{key}" for key in zero)]:
            if key in _SET_ELSEWHERE:
                raise ValueError(f"deepspeed.{key} is set by {_SET_ELSEWHERE[key]}: remove it here")
        for key in self.deepspeed:
            if key not in _NATIVE_SETTINGS:
                near = difflib.get_close_matches(key, _NATIVE_SETTINGS, n=1)
                nearest = f"; nearest: {near[0]}" if near else ""
                raise ValueError(f"deepspeed.{key} is no setting of DeepSpeed's that scalevit passes on{nearest}")
        return self

    @model_validator(mode="after")
    def _fits_the_stage(self) -> "DeepSpeedConfig":
        needed = {
            "overlap_comm": 1 if self.overlap_comm is not None else 0,
            "offload_optimizer": {None: 0, "cpu": 1, "nvme": 3}[self.offload_optimizer],
            "offload_parameters": 0 if self.offload_parameters is None else 3,
        }
        for key, stage in needed.items():
            if self.stage < stage:
                value = json.dumps(getattr(self, key))
                raise ValueError(f"{key} = {value} needs stage {stage} or above, not {self.stage}")
        for key in ("prescale_gradients", "gradient_predivide_factor"):
            if self.stage and key in self.deepspeed:
                raise ValueError(f"deepspeed.{key} needs stage 0, not {self.stage}")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path and an offload to nvme need each other: give both or none")
        return self


class FsdpConfig(Section):
    """PyTorch FSDP2 (`fully_shard`)."""

    name: Literal["fsdp"] = "fsdp"
    shard_size: PositiveInt | None = None
    """Ranks that together hold one copy of the model, neighbours in rank; null: all of them. Fewer is HSDP, for example
    the GPUs of a node: each such group holds a copy, and only gradients cross between groups."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block between its forward and its backward; false gathers once per step."""
    mixed_precision: Literal["autocast", "policy"] = "autocast"
    """autocast: gathers fp32, casts per operation, as DeepSpeed's engine does; policy: FSDP2's MixedPrecisionPolicy,
    gathers in train.precision (half the bytes), reduces in fp32, and LayerNorm and softmax compute in it too."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in the CPU's memory."""
    prefetch: PositiveInt | None = None
    """Blocks whose parameters are gathered ahead of the one that computes, forward and backward; null leaves it to
    FSDP2 (one ahead)."""

    @property
    def offloads(self) -> bool:
        """Whether parameters lie in the CPU's memory."""
        return self.cpu_offload


Engine = Annotated[DeepSpeedConfig | FsdpConfig, Field(discriminator="name")]


class TrackingConfig(Section):
    """Weights & Biases, beside the files that are always written."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "scalevit"
    entity: str | None = None
    tags: list[str] = []


class Config(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run and of its folder."""
    output_dir: FilePath = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    model: ModelConfig = ModelConfig()
    reduction: Reduction = NoReduction()
    kernels: KernelsConfig = KernelsConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: Engine = DeepSpeedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        train, optimizer = self.train, self.optimizer
        if train.global_batch % train.micro_batch:
            raise ValueError(
                f"train.global_batch = {train.global_batch} is not a multiple of "
                f"train.micro_batch = {train.micro_batch}"
            )
        if optimizer.warmup_epochs >= train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs = {optimizer.warmup_epochs} must be below train.epochs = {train.epochs}"
            )
        augmentation = self.data.augmentation
        if train.micro_batch % 2 and augmentation.mix_probability and (augmentation.mixup or augmentation.cutmix):
            raise ValueError(f"train.micro_batch = {train.micro_batch} must be even for mixup and CutMix")
        if (
            isinstance(self.engine, FsdpConfig)
            and self.engine.mixed_precision == "policy"
            and train.precision == "fp32"
        ):
            raise ValueError("engine.mixed_precision = policy needs train.precision = bf16 or fp16, not fp32")
        if train.meta_init and isinstance(self.engine, DeepSpeedConfig) and self.engine.stage < 3:
            raise ValueError(
                f"train.meta_init = true needs engine.name = fsdp or engine.stage = 3: stage {self.engine.stage} holds "
                "the whole model on each rank"
            )
        if self.model.num_classes == 1 and train.label_smoothing:
            raise ValueError("model.num_classes = 1 cannot be combined with train.label_smoothing")
        return self
