"""DeepSpeed ZeRO, stages 0 to 3, with torch's AdamW and fp32 weights; bf16 and fp16 are autocast inside the module.

DeepSpeed's own precision modes are not used: its stages wrap different optimizers under them and disagree, while in
fp32 all stages agree with one process. It compiles nothing: the optimizer is a client's, and on a CPU its shared-memory
reduction is replaced by gloo.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Without it DeepSpeed looks for every accelerator it knows and warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils import (
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from deepspeed.utils.tensor_fragment import fragment_address
from pydantic import ValidationError
from torch import Tensor, nn

from scalevit.engines.base import Engine, Setup, StepResult, clip_factor, step_counter
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.state import Moments, Piece
from scalevit.errors import UserError

# What DeepSpeed's own checkpoints hold beside tensors and plain values.
CLASSES_IN_CHECKPOINTS: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

_LINEAR = nn.functional.linear


class DeepSpeedEngine(Engine):
    """A `deepspeed.initialize`d module."""

    name = "deepspeed"

    def __init__(self, module: nn.Module, setup: Setup, settings: DeepSpeedSettings):
        self.stage = settings.stage
        self.settings = settings
        super().__init__(module, setup)

    def _shard(self, module: nn.Module) -> nn.Module:
        _quieten()
        if self.world.device.type == "cpu":
            # DeepSpeed would compile its own reduction over /dev/shm for a minute, and leave 67 MB there per run.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.stage == 3:
            for block in self.setup.blocks:
                set_z3_leaf_module(block, True)
        deepspeed.init_distributed()  # takes over the process group that exists
        if self.setup.initial_values is not None:
            self._materialise(module, self.setup.initial_values())
        self.optimizer = self.setup.optimizer(module)
        try:
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=self._native_config(), dist_init_required=False
            )
        except (ValidationError, DeepSpeedConfigError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"config: engine.native is refused by DeepSpeed: {reason[:300]}") from error
        if self.stage == 3:
            self._reduce_parameters_of_leaves_once()
        return self.engine.module

    def _materialise(self, module: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
        """Fills a module on the meta device from whole tensors, at stage 3, and shards each as it comes."""
        assert self.stage == 3, "check_engine"
        buffers = {name for name, _ in module.named_buffers()}
        names = {canonical: [canonical] for canonical in [*dict(module.named_parameters()), *buffers]}
        for further, canonical in self.tied.items():
            names[canonical].append(further)
        first: Any = None
        for canonical, whole in values:
            parameter = nn.Parameter(whole.to(self.world.device, copy=True))
            is_buffer = canonical in buffers
            for name in names.pop(canonical):
                owner, _, key = name.rpartition(".")
                setattr(module.get_submodule(owner), key, parameter.data if is_buffer else parameter)
            if is_buffer:
                continue
            if first is None:
                first = parameter
                deepspeed.zero.Init(
                    module=nn.ParameterList([parameter]), config_dict_or_path=self._native_config(), dtype=torch.float32
                )
            else:
                first.convert_to_zero_parameters(param_list=[parameter])
        assert not names, f"without initial values: {sorted(names)[:4]}"

    def _reduce_parameters_of_leaves_once(self) -> None:
        """Puts ZeRO-3's hooks for leaves right: the blocks, which are gathered as one and not module by module.

        That takes fewer and larger messages, leaves the inside of a block to the compiler, and serves kernels that read
        parameters of modules they do not call. But DeepSpeed 0.19.8 reduces a leaf's gradients after each of its uses
        and stops where two leaves share a parameter. Reducing a parameter when its gradient is complete, as outside
        of leaves, is right for both.
        """
        zero = self.engine.optimizer
        for hook in [*zero._leaf_module_hooks, *zero._grad_acc_hooks]:
            hook.remove()
        zero._leaf_module_hooks.clear()
        zero._grad_acc_hooks.clear()
        for parameter in self.engine.module.parameters():
            vars(parameter).pop("ds_z3_leaf_module", None)
        zero.create_reduce_and_remove_grad_hooks()

    def _native_config(self) -> dict[str, Any]:
        limit = self.setup.clip_grad_norm
        native = {
            "steps_per_print": None,
            **self.settings.native,
            "zero_optimization": {**self.settings.native.get("zero_optimization", {}), **self._zero_config()},
            "train_micro_batch_size_per_gpu": self.setup.micro_batch,
            "gradient_accumulation_steps": self.setup.accumulation,
            # Stage 0 clips in `step` below, where the norm is known anyway.
            "gradient_clipping": limit if limit is not None and self.stage > 0 else 0.0,
        }
        if self.settings.offload_optimizer is not None:
            # Torch's AdamW steps on the CPU as well; DeepSpeed's would be compiled for a minute first.
            native["zero_force_ds_cpu_optimizer"] = False
        return native

    def _zero_config(self) -> dict[str, Any]:
        """The part of `zero_optimization` that has keys of its own in our config."""
        settings = self.settings
        zero: dict[str, Any] = {"stage": self.stage}
        if settings.overlap_comm is not None:
            zero["overlap_comm"] = settings.overlap_comm
        for key, device in (
            ("offload_optimizer", settings.offload_optimizer),
            ("offload_param", settings.offload_parameters),
        ):
            if device is not None:
                zero[key] = {"device": device, "pin_memory": self.world.device.type == "cuda"}
            if device == "nvme":
                zero[key]["nvme_path"] = settings.nvme_path
        return zero

    def __call__(self, images: Tensor) -> Tensor:
        return self.engine(images)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.stage > 0 and self.loss_scale.enabled:
            self.engine.optimizer.override_loss_scale(self.loss_scale.value)
            self.engine.backward(loss)
        else:
            self.engine.backward(loss * self.loss_scale.value)

    def step(self, lr: float) -> StepResult:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        result = self._step_replicated() if self.stage == 0 else self._step_sharded()
        self.loss_scale.update(overflow=result.skipped)
        return result

    def _step_sharded(self) -> StepResult:
        # ZeRO takes the norm over all ranks, unscales, clips, and skips the step where the norm is not finite.
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepResult(float(norm), skipped=not self.engine.was_step_applied())

    def _step_replicated(self) -> StepResult:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() / self.loss_scale.value
        if not norm < float("inf"):
            self.engine.zero_grad()
            return StepResult(norm, skipped=True)
        factor = clip_factor(norm, self.setup.clip_grad_norm) / self.loss_scale.value
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self.engine.step()
        return StepResult(norm, skipped=False)

    def close(self) -> None:
        self.engine.destroy()
        if self.stage == 3:
            # DeepSpeed replaced it for the whole process, by one that does not keep gathered weights for the backward.
            # Later engines would use that one too, and it rounds differently.
            nn.functional.linear = _LINEAR

    # --- state ----------------------------------------------------------------------------------------------

    def local_parameters(self) -> dict[str, Tensor]:
        if self.stage == 3:
            return {name: p.ds_tensor.data for name, p in self._named_parameters()}
        return {name: p.data for name, p in self._named_parameters()}

    def _named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Unique parameters with the attributes that ZeRO hangs on them."""
        yield from self.module.named_parameters()

    def refresh(self) -> None:
        if self.stage == 3:
            # Small parameters stay gathered for good: throw the copies away and gather them anew.
            zero = self.engine.optimizer
            zero._partition_all_parameters()
            if zero.persistent_parameters:
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, parameter in self._named_parameters():
            whole = local[name]
            if self.stage == 3:
                flat = torch.empty(self.world.size * whole.numel(), dtype=whole.dtype, device=whole.device)
                dist.all_gather_into_tensor(flat, whole.contiguous())
                whole = flat[: parameter.ds_numel].view(parameter.ds_shape)  # the last rank's part is padded
            if self.world.is_first:
                full[name] = whole.to("cpu", copy=True)
        return full

    def pieces(self, local: Mapping[str, Tensor]) -> dict[str, Piece]:
        world, pieces = self.world, {}
        for name, parameter in self._named_parameters():
            flat = local[name].view(-1)
            if self.stage < 3:
                pieces[name] = Piece(flat, 0, parameter.shape, replica=world.rank, replicas=world.size)
            else:
                # Every rank holds as many elements: the last ones' are padding.
                start = min(world.rank * flat.numel(), parameter.ds_numel)
                pieces[name] = Piece(flat[: parameter.ds_numel - start], start, parameter.ds_shape)
        return pieces

    def adopt_weights(self) -> None:
        # ZeRO optimizes its own sharded fp32 copy, and overwrites the module's weights from it at every step.
        if self.stage == 3:
            for _, parameter in self._named_parameters():
                safe_set_local_fp32_param(parameter, parameter.ds_tensor.data)
        elif self.stage > 0:
            for _, parameter in self._named_parameters():
                for ours, storage, theirs in self._partition_of(parameter):
                    storage.data[theirs] = parameter.data.view(-1)[ours]
        self.refresh()

    def moment_pieces(self) -> dict[str, Piece]:
        return {name: piece.empty_like() for name, piece in self._moments_as_pieces(None).items()}

    def moments(self) -> Moments:
        states = list(self.optimizer.state.values())
        if not states or not all("exp_avg" in state for state in states):
            return Moments(0, {}, {})  # before the first step
        exp_avg, exp_avg_sq = (self._moments_as_pieces(key) for key in ("exp_avg", "exp_avg_sq"))
        return Moments(int(states[0]["step"]), exp_avg, exp_avg_sq)

    def load_moments(self, moments: Moments) -> None:
        if not moments.steps:
            self.optimizer.state.clear()
            return
        for index, storage in enumerate(self._optimized_tensors()):
            with self._on_hand(index):
                self.optimizer.state[storage] = {
                    "step": step_counter(self.optimizer, moments.steps, storage.device),
                    "exp_avg": torch.zeros_like(storage),
                    "exp_avg_sq": torch.zeros_like(storage),
                }
        for key, kept in (("exp_avg", moments.exp_avg), ("exp_avg_sq", moments.exp_avg_sq)):
            if self.stage == 3:
                for name, parameter in self._named_parameters():
                    padded = torch.zeros_like(parameter.ds_tensor, dtype=torch.float32)
                    padded[: kept[name].values.numel()] = kept[name].values
                    safe_set_local_optimizer_state(parameter, padded, key)
            else:
                for name, piece in self._moments_as_pieces(key).items():
                    piece.values.copy_(kept[name].values)

    def save_native(self, folder: Path, tag: str, step: int) -> None:
        """Writes DeepSpeed's own checkpoint, for programs that use DeepSpeed without scalevit."""
        self.engine.global_steps = step
        self.engine.save_checkpoint(str(folder), tag=tag)

    @contextmanager
    def _on_hand(self, group: int) -> Iterator[None]:
        """Has one group of the optimizer's tensors in memory, where they lie on NVMe otherwise."""
        zero = self.engine.optimizer
        if self.stage < 3 or not zero._swappable_optimizer_subgroup(group):
            yield
            return
        zero._optimizer_states_and_gradient_swap_in(group)
        yield
        zero._optimizer_states_and_gradient_swap_out(group)

    def _moments_as_pieces(self, key: str | None) -> dict[str, Piece]:
        """One of AdamW's moments; (key None) what is laid out like them."""
        if self.stage == 0 or (self.stage == 3 and key is None):
            local = self.local_parameters()
            return self.pieces(
                local if key is None else {n: self.optimizer.state[p][key] for n, p in self._named_parameters()}
            )
        if self.stage == 3:
            return self.pieces({n: safe_get_local_optimizer_state(p, key) for n, p in self._named_parameters()})
        pieces = {}
        for name, parameter in self._named_parameters():
            for ours, storage, theirs in self._partition_of(parameter):
                values = storage.data if key is None else self.optimizer.state[storage][key]
                pieces[name] = Piece(values[theirs], ours.start, parameter.shape)
        return pieces

    def _optimized_tensors(self) -> list[Tensor]:
        """What AdamW keeps state for: the parameters, or ZeRO's flat fp32 partitions."""
        if self.stage == 0:
            return list(self.module.parameters())
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _partition_of(self, parameter: Any) -> list[tuple[slice, Tensor, slice]]:
        """Stages 1 and 2: which elements of a parameter this rank optimizes, and where: at most one
        (elements of the flat parameter, ZeRO's flat fp32 tensor, elements of that).

        DeepSpeed's own `safe_get_full_optimizer_state` is no use here: it links the states after the first parameter
        group's first step, when the second group has none, and raises ever after (deepspeed 0.19.8).
        """
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
        storage = self.engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return [
            (
                slice(ours.start, ours.start + ours.numel),
                storage,
                slice(theirs.start, theirs.start + theirs.numel),
            )
        ]


def check_native(settings: DeepSpeedSettings) -> None:
    """Makes sure that DeepSpeed can read its own settings. Needs no process group.

    Raises:
        UserError: it refuses one.
    """
    try:
        DeepSpeedZeroConfig(**settings.native.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"config: engine.native.zero_optimization.{key} is refused by DeepSpeed: {first['msg']}"
        ) from None


def check_offload(settings: DeepSpeedSettings) -> None:
    """Makes sure that this machine can offload to NVMe where the config asks for it. Needs no process group.

    Raises:
        UserError: DeepSpeed's asynchronous file operations cannot be built here, or there is no such folder.
    """
    if settings.nvme_path is None:
        return
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "config: an offload to nvme needs DeepSpeed's async_io, which cannot be built here: install libaio's "
            "development files (Debian: libaio-dev), or offload to cpu"
        )
    if not os.access(settings.nvme_path, os.W_OK | os.X_OK):
        raise UserError(f"config: engine.nvme_path = {settings.nvme_path!r} is no folder that can be written to")


def _quieten() -> None:
    """DeepSpeed announces every setting; its warnings and errors stay."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
