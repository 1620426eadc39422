"""DeepSpeed ZeRO, stages 0 to 3, with a torch optimizer and fp32 weights; bf16 and fp16 are autocast inside the module.

DeepSpeed's own precision modes are not used: its stages wrap different optimizers under them and disagree, while in
fp32 all stages agree with one process. It compiles nothing: the optimizer is a client's, and on a CPU its shared-memory
reduction is replaced by gloo. Private names of DeepSpeed are in `internals`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from scalevit.engines.base import Engine, EngineSpec, StepResult
from scalevit.engines.deepspeed import internals
from scalevit.engines.deepspeed.settings import DeepSpeedSettings
from scalevit.engines.optimizer_access import (
    ScalarCollector,
    kept_scalars,
    kept_tensors,
    placed_scalar,
    scalars_of,
)
from scalevit.engines.state import OptimizerState, StateTensor, TensorSlice
from scalevit.errors import UserError

# isort: split
# After internals, which chooses DeepSpeed's accelerator.
import deepspeed
from deepspeed.utils import (
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)


class DeepSpeedEngine(Engine):
    """A `deepspeed.initialize`d module."""

    name = "deepspeed"

    def __init__(self, module: nn.Module, spec: EngineSpec, settings: DeepSpeedSettings):
        self.stage = settings.stage
        self.settings = settings
        super().__init__(module, spec)

    def _shard(self, module: nn.Module) -> nn.Module:
        internals.reduce_log_level()
        if self.world.device.type == "cpu":
            internals.keep_gloo()
        if self.stage == 3:
            for block in self.spec.blocks:
                set_z3_leaf_module(block, True)
        deepspeed.init_distributed()  # takes over the process group that exists
        if self.spec.initial_values is not None:
            self._materialise(module, self.spec.initial_values())
        self.optimizer = self._build_optimizer(module)
        try:
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=self._native_config(), dist_init_required=False
            )
        except (ValidationError, internals.DeepSpeedConfigError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"DeepSpeed refuses its native settings: {reason[:300]}") from error
        if self.stage == 3:
            internals.reduce_parameters_of_leaves_once(self.engine.optimizer, self.engine.module)
            internals.step_each_group_once(self.optimizer, self.engine.optimizer, self.group_counters)
        return self.engine.module

    def _materialise(self, module: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
        """Fills a module on the meta device from whole tensors, at stage 3, and shards each as it comes."""
        assert self.stage == 3, "EngineSettings.check_training"
        buffers = {name for name, _ in module.named_buffers()}
        names = {canonical: [canonical] for canonical in [*dict(module.named_parameters()), *buffers]}
        for further, canonical in self.tied.items():
            names[canonical].append(further)
        first: Any = None
        for canonical, whole in values:
            is_buffer = canonical in buffers
            trained = not is_buffer and module.get_parameter(canonical).requires_grad
            parameter = nn.Parameter(whole.to(self.world.device, copy=True), requires_grad=trained)
            for name in names.pop(canonical):
                owner, _, key = name.rpartition(".")
                setattr(module.get_submodule(owner), key, parameter.data if is_buffer else parameter)
            if is_buffer:
                continue
            internals.shard_parameter(parameter, first, self._native_config())
            first = parameter if first is None else first
        assert not names, f"without initial values: {sorted(names)[:4]}"

    def _native_config(self) -> dict[str, Any]:
        limit = self.spec.clipping.largest_norm
        native = {
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,  # training checks itself which optimizers may step flat tensors
            **self.settings.native,
            "zero_optimization": {**self.settings.native.get("zero_optimization", {}), **self._zero_config()},
            "train_micro_batch_size_per_gpu": self.spec.micro_batch,
            "gradient_accumulation_steps": self.spec.accumulation,
            # Stage 0 clips in `step` below, where the norm is known anyway.
            "gradient_clipping": limit if limit is not None and self.stage > 0 else 0.0,
        }
        if self.settings.offload_optimizer is not None:
            # A torch optimizer steps on the CPU as well; DeepSpeed's AdamW would be compiled for a minute first.
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

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = loss * (self.world.size * self.spec.accumulation)  # by which DeepSpeed divides
        if self.stage > 0 and self.loss_scale.enabled:
            internals.set_loss_scale(self.engine.optimizer, self.loss_scale.value)
            self.engine.backward(loss)
        else:
            self.engine.backward(loss * self.loss_scale.value)

    def step(self, lr: float) -> StepResult:
        self._set_lr(self.engine.optimizer.param_groups, lr)
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
        factor = self.spec.clipping.factor(norm) / self.loss_scale.value
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        named = self.module.named_parameters()
        self.spec.clipping.clip_units((name, p, p.grad) for name, p in named if p.grad is not None)
        self.engine.step()
        return StepResult(norm, skipped=False)

    def close(self) -> None:
        self.engine.destroy()
        if self.stage == 3:
            internals.restore_linear()

    # --- state ----------------------------------------------------------------------------------------------

    def local_parameters(self) -> dict[str, Tensor]:
        if self.stage == 3:
            return {name: internals.shard_of(p) for name, p in self._named_parameters()}
        return {name: p.data for name, p in self._named_parameters()}

    def _named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Unique parameters with the attributes that ZeRO hangs on them."""
        yield from self.module.named_parameters()

    def invalidate_gathered(self) -> None:
        if self.stage == 3:
            internals.gather_again(self.engine.optimizer)

    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, parameter in self._named_parameters():
            whole = local[name]
            if self.stage == 3:
                flat = torch.empty(self.world.size * whole.numel(), dtype=whole.dtype, device=whole.device)
                dist.all_gather_into_tensor(flat, whole.contiguous())
                shape = internals.whole_shape(parameter)
                whole = flat[: shape.numel()].view(shape)  # the last rank's part is padded
            if self.world.is_first:
                full[name] = whole.to("cpu", copy=True)
        return full

    def slices(self, local: Mapping[str, Tensor]) -> dict[str, TensorSlice]:
        return {name: self._slice(local[name], parameter) for name, parameter in self._named_parameters()}

    def _slice(self, local: Tensor, parameter: nn.Parameter) -> TensorSlice:
        flat, world = local.view(-1), self.world
        if self.stage < 3:
            return TensorSlice(flat, 0, parameter.shape, replica=world.rank, replicas=world.size)
        # Every rank holds as many elements: the last ones' are padding.
        shape = internals.whole_shape(parameter)
        start = min(world.rank * flat.numel(), shape.numel())
        return TensorSlice(flat[: shape.numel() - start], start, shape)

    def commit_parameters(self) -> None:
        # ZeRO optimizes its own sharded fp32 copy, and overwrites the module's weights from it at every step.
        if self.stage == 3:
            for _, parameter in self._optimized_parameters():
                safe_set_local_fp32_param(parameter, internals.shard_of(parameter))
        elif self.stage > 0:
            zero = self.engine.optimizer
            flats = internals.flat_tensors(zero, self.stage)
            for _, parameter in self._optimized_parameters():
                if (found := internals.partition_of(parameter)) is not None:
                    ours, number, theirs = found
                    flats[number].data[theirs] = parameter.data.view(-1)[ours]
        self.invalidate_gathered()

    # --- optimizer state ------------------------------------------------------------------------------------

    def optimizer_state_layout(self, tensors: Mapping[str, StateTensor]) -> dict[str, dict[str, TensorSlice]]:
        own = self._optimized_slices(None) if self.stage > 0 else {}
        return {
            key: {
                name: (self._whole(torch.empty(shape, device="meta")) if self.stage == 0 else own[name])
                .empty_like(described.dtype)
                for name, shape in described.shapes.items()
            }
            for key, described in tensors.items()
        }  # fmt: skip

    def optimizer_state(self) -> OptimizerState:
        tensors: dict[str, dict[str, TensorSlice]] = {}
        scalars = ScalarCollector()
        sharded: set[str] = set()
        for number, (stepped, names) in enumerate(self._stepped()):
            group_number = self._group_number(number)
            group = self.optimizer.param_groups[group_number]
            with self._swapped_in(number):
                state = self.optimizer.state.get(stepped, {})
                scalars.add(names, kept_scalars(state), self.group_counters.of(group_number, group))
                for key, value in kept_tensors(state).items():
                    if self.stage == 0:
                        tensors.setdefault(key, {})[names[0]] = self._whole(value)
                    else:
                        sharded.add(key)
        for key in sorted(sharded):
            tensors[key] = self._optimized_slices(key)
        return OptimizerState(type(self.optimizer).__name__, tensors, scalars.scalars)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        if state.is_empty:
            self.optimizer.state.clear()
            return
        for number, (stepped, names) in enumerate(self._stepped()):
            # The parameters of a flat tensor have the same scalars: they are stepped together.
            own, counters = scalars_of(state, names[0])
            group_number = self._group_number(number)
            group = self.optimizer.param_groups[group_number]
            self.group_counters.replace(group_number, group, counters)
            with self._swapped_in(number):
                kept: dict[str, Any] = {k: placed_scalar(k, v, group, stepped.device) for k, v in own.items()}
                for key, slices in state.tensors.items():
                    if self.stage > 0:
                        kept[key] = torch.zeros_like(stepped, dtype=next(iter(slices.values())).values.dtype)
                    elif names[0] in slices:
                        whole = slices[names[0]]
                        kept[key] = whole.values.view(whole.shape).to(stepped.device, copy=True)
                self.optimizer.state[stepped] = kept
        if self.stage > 0:
            for key, slices in state.tensors.items():
                self._fill_optimized(key, slices)

    def _fill_optimized(self, key: str, slices: Mapping[str, TensorSlice]) -> None:
        """Stages 1 to 3: copies slices into one of the optimizer's tensors."""
        if self.stage < 3:
            for name, own in self._optimized_slices(key).items():
                own.values.copy_(slices[name].values)
            return
        for name, parameter in self._optimized_parameters():
            values = slices[name].values
            padded = torch.zeros_like(internals.shard_of(parameter), dtype=values.dtype)
            padded[: values.numel()] = values
            safe_set_local_optimizer_state(parameter, padded, key)

    def save_native(self, folder: Path, tag: str, step: int) -> None:
        """Writes DeepSpeed's own checkpoint, for programs that use DeepSpeed without scalevit."""
        self.engine.global_steps = step
        self.engine.save_checkpoint(str(folder), tag=tag)

    def _stepped(self) -> list[tuple[Tensor, list[str]]]:
        """What the optimizer steps, with the names of the parameters in it: parameters, or ZeRO's flat tensors."""
        if self.stage == 0:
            own = {id(parameter): name for name, parameter in self._named_parameters()}
            groups = self.optimizer.param_groups
            return [(parameter, [own[id(parameter)]]) for group in groups for parameter in group["params"]]
        zero, own = self.engine.optimizer, {id(p): name for name, p in self._named_parameters()}
        flats = internals.flat_tensors(zero, self.stage)
        parameters = internals.parameters_of_flat(zero, self.stage)
        return [(flat, [own[id(p)] for p in inside]) for flat, inside in zip(flats, parameters, strict=True)]

    def _optimized_parameters(self) -> Iterator[tuple[str, Any]]:
        """Stages 1 to 3: the parameters in ZeRO's flat tensors; those that are not trained are in none."""
        optimized = {name for _, names in self._stepped() for name in names}
        return ((name, parameter) for name, parameter in self._named_parameters() if name in optimized)

    def _group_number(self, number: int) -> int:
        """The parameter group of what `_stepped` has under a number."""
        if self.stage > 0:
            return internals.group_of_flat(self.engine.optimizer, self.stage, number)
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        return next(index for index in range(len(sizes)) if number < sum(sizes[: index + 1]))

    def _swapped_in(self, number: int) -> Any:
        return internals.swapped_in(self.engine.optimizer, self.stage, number)

    def _optimized_slices(self, key: str | None) -> dict[str, TensorSlice]:
        """Stages 1 to 3: one of the optimizer's tensors; (key None) what is laid out like them."""
        if self.stage == 3:
            return {
                name: self._slice(internals.shard_of(p) if key is None else safe_get_local_optimizer_state(p, key), p)
                for name, p in self._optimized_parameters()
            }
        zero, slices = self.engine.optimizer, {}
        flats = internals.flat_tensors(zero, self.stage)
        buffers = [flat.data if key is None else self.optimizer.state[flat][key] for flat in flats]
        for name, parameter in self._optimized_parameters():
            found = internals.partition_of(parameter)
            ours, number, theirs = found or (slice(0, 0), 0, slice(0, 0))
            slices[name] = TensorSlice(buffers[number][theirs], ours.start, parameter.shape)
        return slices

    def _whole(self, value: Tensor) -> TensorSlice:
        """Stage 0: a tensor that every rank holds."""
        return TensorSlice(value.reshape(-1), 0, value.shape, self.world.rank, self.world.size)
