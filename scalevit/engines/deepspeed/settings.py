"""The settings of DeepSpeed ZeRO."""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import ValidationError, model_validator

from scalevit.config.base import ClipMode, FilePath, Precision
from scalevit.engines.settings import EngineSettings, UpdateScope
from scalevit.errors import SettingError, UserError, nearest_hint

if TYPE_CHECKING:
    from torch import nn

    from scalevit.distributed import World
    from scalevit.engines.base import Engine, EngineSpec
    from scalevit.engines.cost import EngineCost, ParameterLayout, Workload

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Native settings that only stage 0 has.
_REPLICATED_ONLY = ("prescale_gradients", "gradient_predivide_factor")
# Native DeepSpeed settings that follow from other keys of this config.
_SET_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_grad",
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
# What DeepSpeed reads at the top level of its config; it silently ignores any other name.
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


class DeepSpeedSettings(EngineSettings):
    """DeepSpeed ZeRO."""

    name: Literal["deepspeed"] = "deepspeed"
    stage: Stage = 1
    """0 replicates; 1 shards the optimizer state, 2 the gradients too, 3 the parameters too."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward; null: DeepSpeed's default (at stage 3 yes, else no)."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """Where the optimizer state is kept and updated, from stage 1 on; nvme only at stage 3."""
    offload_parameters: Literal["cpu", "nvme"] | None = None
    """Where sharded parameters are kept while they are not in use, at stage 3."""
    nvme_path: FilePath | None = None
    """Folder on each node's NVMe for what is offloaded to nvme."""
    native: dict[str, Any] = {}
    """Native DeepSpeed settings, merged into ours; what another key of this config sets may not appear here."""

    @property
    def offloads(self) -> bool:
        """Whether parameters are kept in the CPU's memory."""
        return self.offload_parameters is not None

    @property
    def label(self) -> str:
        return f"ZeRO {self.stage}"

    @property
    def overlaps_communication(self) -> bool:
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm

    @property
    def not_estimated(self) -> list[str]:
        return [name for name in ("offload_optimizer", "offload_parameters") if getattr(self, name)]

    def variants(self) -> Sequence[EngineSettings]:
        return [self if stage == self.stage else self._at_stage(stage) for stage in STAGES]

    def _at_stage(self, stage: Stage) -> "DeepSpeedSettings":
        """Another stage with these settings as far as it has them; nothing is offloaded."""
        if stage == 0:
            return DeepSpeedSettings(stage=stage, native=self.native)
        native = {key: value for key, value in self.native.items() if key not in _REPLICATED_ONLY}
        return DeepSpeedSettings(stage=stage, overlap_comm=self.overlap_comm, native=native)

    def cost(self, layout: "ParameterLayout", workload: "Workload") -> "EngineCost":
        from scalevit.engines.deepspeed.cost import deepspeed_cost

        return deepspeed_cost(self, layout, workload)

    def check_training(self, *, precision: Precision, meta_init: bool) -> None:
        if precision == "bf16-weights":
            raise ValueError(
                "train.precision = bf16-weights needs engine.name = fsdp: ZeRO keeps fp32 copies of 16-bit weights"
            )
        if meta_init and self.stage < 3:
            raise ValueError(
                f"train.meta_init = true needs engine.name = fsdp or engine.stage = 3: stage {self.stage} holds "
                "the whole model on each rank"
            )

    def check(self, world: "World") -> None:
        if self.native:
            self._check_native()
        if self.nvme_path is not None:
            self._check_nvme(self.nvme_path)

    def _check_native(self) -> None:
        """Has DeepSpeed read its own settings."""
        from scalevit.engines.deepspeed.internals import DeepSpeedZeroConfig

        try:
            DeepSpeedZeroConfig(**self.native.get("zero_optimization", {}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise SettingError(
                "native", self.native, f"DeepSpeed refuses zero_optimization.{key}: {first['msg']}"
            ) from None

    @staticmethod
    def _check_nvme(path: str) -> None:
        """Makes sure that this machine can offload to NVMe."""
        from scalevit.engines.deepspeed.internals import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                "config: an offload to nvme needs DeepSpeed's async_io, which cannot be built here: install libaio's "
                "development files (Debian: libaio-dev), or offload to cpu"
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise SettingError("nvme_path", path, "is not a writable folder")

    def update_scope(self, world: "World") -> UpdateScope:
        # From stage 1 on the optimizer steps flat tensors, which hold parts of many parameters.
        return "elements" if self.stage else "matrices"

    @property
    def clip_modes(self) -> Sequence[ClipMode]:
        # A rank's part of a flat tensor begins and ends anywhere in a row.
        return ("norm", "value") if self.stage else ("norm", "value", "agc")

    def build(self, module: "nn.Module", spec: "EngineSpec") -> "Engine":
        # Imported here: DeepSpeed takes seconds to import, and an FSDP run needs none of it.
        from scalevit.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(module, spec, self)

    @model_validator(mode="after")
    def _no_conflicts(self) -> "DeepSpeedSettings":
        zero = self.native.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError("native.zero_optimization must be a section")
        for key in [*self.native, *(f"zero_optimization.{key}" for key in zero)]:
            if key in _SET_ELSEWHERE:
                raise ValueError(f"native.{key} is set by {_SET_ELSEWHERE[key]}: remove it here")
        for key in self.native:
            if key not in _NATIVE_SETTINGS:
                hint = nearest_hint(key, _NATIVE_SETTINGS, cutoff=0.6)
                raise ValueError(f"native.{key} is not a DeepSpeed setting that scalevit forwards{hint}")
        return self

    @model_validator(mode="after")
    def _fits_the_stage(self) -> "DeepSpeedSettings":
        needed = {
            "overlap_comm": 1 if self.overlap_comm is not None else 0,
            "offload_optimizer": {None: 0, "cpu": 1, "nvme": 3}[self.offload_optimizer],
            "offload_parameters": 0 if self.offload_parameters is None else 3,
        }
        for key, stage in needed.items():
            if self.stage < stage:
                value = json.dumps(getattr(self, key))
                raise ValueError(f"{key} = {value} needs stage {stage} or above, not {self.stage}")
        for key in _REPLICATED_ONLY:
            if self.stage and key in self.native:
                raise ValueError(f"native.{key} needs stage 0, not {self.stage}")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path and an offload to nvme need each other: give both or none")
        return self
