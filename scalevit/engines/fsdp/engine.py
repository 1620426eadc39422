"""PyTorch FSDP2: `fully_shard` over the blocks; blocks that share a module are one unit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scalevit.engines.base import Engine, EngineSpec, StepResult
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.engines.optimizer_access import (
    ScalarCollector,
    kept_scalars,
    kept_tensors,
    placed_scalar,
    scalars_of,
)
from scalevit.engines.precision import DTYPES
from scalevit.engines.state import OptimizerState, StateTensor, TensorSlice
from scalevit.errors import UserError
from scalevit.tying import group_by_shared_parameters


class FsdpEngine(Engine):
    """`fully_shard`, with fp32 weights unless the precision says otherwise; bf16 and fp16 come from autocast inside the
    module, or from FSDP2's policy.
    """

    name = "fsdp"

    def __init__(self, module: nn.Module, spec: EngineSpec, settings: FsdpSettings):
        self.settings = settings
        # Where weights are bf16 themselves, the policy casts the images and reduces gradients in fp32.
        self._has_policy = settings.mixed_precision == "policy" or spec.precision == "bf16-weights"
        self.autocasts = not self._has_policy
        super().__init__(module, spec)

    def _shard(self, module: nn.Module) -> nn.Module:
        self._mesh = self._build_mesh()
        own = self.settings.reshard_after_forward
        for block in self.spec.blocks:
            block.forward = partial(without_view, block.forward)
        # A parameter may belong to one unit only. Blocks that share a module are one unit together: it is gathered
        # before the first of them runs and freed after the last, and its gradient is reduced when all have added to it.
        self._units = [
            self._fully_shard(blocks, reshard_after_forward=own)
            for blocks in group_by_shared_parameters(self.spec.blocks)
        ]
        # What is left (embeddings, norm, head) is used at both ends of a step.
        root = self._fully_shard([module], reshard_after_forward=False, output_dtype=torch.float32)
        self._set_prefetch(root, self.settings.prefetch)
        self._root = root
        self._units.append(root)
        if self.world.device.type == "cpu":
            for unit in self._units:
                # gloo has no averaging reduction: sum, and divide in FSDP's own code.
                unit.set_force_sum_reduction_for_comms(True)
        if self.spec.initial_values is not None:
            self._materialise(module, self.spec.initial_values())
        if self.spec.update_scope == "tensors" and self._mesh.size(-1) > 1:
            rehearse_on_shards(self.spec, self._mesh)
        self.optimizer = self._build_optimizer(module)
        self._parameters = dict(module.named_parameters())
        self._stepped: dict[str, Tensor] = dict(self._parameters)
        if self._mesh.size(-1) == 1:
            self._step_whole_tensors()
        return module

    def _step_whole_tensors(self) -> None:
        """On one shard: has the optimizer step plain tensors that share the parameters' memory.

        Each rank then holds whole tensors, so any optimizer computes as in one process. Some would fail on DTensors,
        because they mix them with plain tensors.
        """
        self._stepped = {name: nn.Parameter(_local_part(p.detach())) for name, p in self._parameters.items()}
        plain = {p: self._stepped[name] for name, p in self._parameters.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [plain[p] for p in group["params"]]
        for parameter, state in list(self.optimizer.state.items()):  # some optimizers fill it before the first step
            self.optimizer.state[plain[parameter]] = {  # type: ignore[index]
                key: _local_part(value) if isinstance(value, Tensor) else value for key, value in state.items()
            }
            del self.optimizer.state[parameter]

    @torch.no_grad()
    def _materialise(self, module: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
        """Gives storage to shards on the meta device, and fills them from whole tensors."""
        module.to_empty(device="cpu" if self.settings.cpu_offload else self.world.device)
        targets = dict([*module.named_parameters(), *module.named_buffers()])
        for tensor in targets.values():
            if tensor.is_floating_point():
                _local_part(tensor).fill_(torch.nan)  # so that what gets no value is found
        for name, whole in values:
            target = targets[name]
            if isinstance(target, DTensor):
                part = _slice(target.to_local(), target)
                part.values.copy_(whole.flatten()[part.start :][: part.values.numel()])
            else:
                target.copy_(whole)
        empty = [name for name, tensor in targets.items() if _local_part(tensor).isnan().any()]
        assert not empty, f"without initial values: {empty[:4]}"

    def _build_mesh(self) -> DeviceMesh:
        """One dimension, or for HSDP (replicas, shards). Explicit: fully_shard's default mesh looks for a GPU."""
        device, ranks = self.world.device.type, self.world.size
        shards = self.settings.shard_size
        if shards is None:
            return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (ranks // shards, shards), mesh_dim_names=("replicate", "shard"))

    def _fully_shard(
        self, modules: list[nn.Module], *, reshard_after_forward: bool, output_dtype: torch.dtype | None = None
    ) -> FSDPModule:
        """Makes one unit of the modules; returns one of them, which speaks for the unit."""
        options: dict[str, Any] = {}
        if self._has_policy:
            # Only the root returns fp32: a LayerNorm with bf16 weights takes no fp32 input.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=DTYPES[self.spec.precision], reduce_dtype=torch.float32, output_dtype=output_dtype
            )
        if self.settings.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=self._mesh,
            reshard_after_forward=reshard_after_forward,
            **options,
        )
        unit = modules[0]
        assert isinstance(unit, FSDPModule)
        return unit

    def _set_prefetch(self, root: FSDPModule, depth: int | None) -> None:
        """Has each unit gather the `depth` ones that follow it, in the forward and in the backward."""
        if depth is None:
            return
        units = self._units
        root.set_modules_to_forward_prefetch(units[:depth])
        root.set_modules_to_backward_prefetch(units[::-1][:depth])
        for index, unit in enumerate(units):
            unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + depth])
            unit.set_modules_to_backward_prefetch(units[:index][::-1][:depth])

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients stay whole on each rank until the accumulation is complete, and are then reduced once.
        self._root.set_requires_gradient_sync(last)
        if not self.settings.reshard_after_forward:
            self._root.set_reshard_after_backward(last)
        # FSDP2 divides by the number of ranks.
        (loss * (self.loss_scale.value * self.world.size)).backward()

    def step(self, lr: float) -> StepResult:
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        grad_norm = self._norm(gradients) / self.loss_scale.value
        finite = grad_norm < float("inf")  # false for nan too
        if finite:
            factor = self.spec.clipping.factor(grad_norm) / self.loss_scale.value
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            self._clip_units()
            self._set_lr(self.optimizer.param_groups, lr)
            self._hand_over_gradients()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters.values():
            parameter.grad = None
        self.loss_scale.update(overflow=not finite)
        return StepResult(grad_norm, skipped=not finite)

    def _clip_units(self) -> None:
        gradients = (
            (name, _local_part(parameter.detach()), _local_part(parameter.grad))
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        )
        self.spec.clipping.clip_units(gradients, self._sum_over_shards if self._mesh.size(-1) > 1 else None)

    def _sum_over_shards(self, values: Tensor) -> None:
        """Adds up small tensors in place, over the ranks that share a copy."""
        total = values.to(self.world.device)  # an offload keeps them on the CPU
        dist.all_reduce(total, group=self._mesh.get_group("shard"))
        values.copy_(total)

    def _hand_over_gradients(self) -> None:
        """Gives plain tensors their parameters' gradients, and the memory that the parameters have by now."""
        for name, parameter in self._parameters.items():
            stepped = self._stepped[name]
            if stepped is not parameter:
                stepped.data = _local_part(parameter.detach())
                stepped.grad = None if parameter.grad is None else _local_part(parameter.grad)

    def _norm(self, gradients: list[Tensor]) -> float:
        """Global L2 norm of this rank's parts: one number crosses between the ranks that share a copy."""
        squared = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
        self._sum_over_shards(squared)
        return squared.sqrt().item()

    # --- state ----------------------------------------------------------------------------------------------

    def local_parameters(self) -> dict[str, Tensor]:
        self.invalidate_gathered()  # units that stay gathered after a forward without backward show no shards
        return {name: _sharded(p).to_local().detach() for name, p in self.module.named_parameters()}

    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, parameter in self._parameters.items():
            whole = _shard_like(local[name], parameter).full_tensor()
            if self.world.is_first:
                full[name] = whole.cpu()
        return full

    def slices(self, local: Mapping[str, Tensor]) -> dict[str, TensorSlice]:
        return {name: _slice(local[name], parameter) for name, parameter in self._parameters.items()}

    def optimizer_state_layout(self, tensors: Mapping[str, StateTensor]) -> dict[str, dict[str, TensorSlice]]:
        own = self.slices(self.local_parameters())
        return {
            key: {
                name: (own[name] if shape == own[name].shape else self._whole(torch.empty(shape, device="meta")))
                .empty_like(described.dtype)
                for name, shape in described.shapes.items()
            }
            for key, described in tensors.items()
        }  # fmt: skip

    def optimizer_state(self) -> OptimizerState:
        tensors: dict[str, dict[str, TensorSlice]] = {}
        scalars = ScalarCollector()
        for name, parameter, (number, group) in self._optimized_parameters():
            state = self.optimizer.state.get(self._stepped[name], {})
            for key, value in kept_tensors(state).items():
                is_like = value.shape == parameter.shape
                local = _local_part(value)
                tensors.setdefault(key, {})[name] = _slice(local, parameter) if is_like else self._whole(local)
            plain = {key: _local_part(value) if isinstance(value, Tensor) else value for key, value in state.items()}
            scalars.add([name], kept_scalars(plain), self.group_counters.of(number, group))
        return OptimizerState(type(self.optimizer).__name__, tensors, scalars.scalars)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        self.optimizer.state.clear()
        for name, parameter, (number, group) in self._optimized_parameters():
            stepped = self._stepped[name]
            local = _sharded(parameter).to_local()
            own, counters = scalars_of(state, name)
            self.group_counters.replace(number, group, counters)
            kept: dict[str, Any] = {key: placed_scalar(key, value, group, local.device) for key, value in own.items()}
            for key, slices in state.tensors.items():
                if name in slices:
                    is_like = slices[name].shape == parameter.shape
                    shape = local.shape if is_like else slices[name].shape
                    value = slices[name].values.view(shape).to(local.device, copy=True)
                    kept[key] = _shard_like(value, parameter) if isinstance(stepped, DTensor) else value
            if kept:
                self.optimizer.state[stepped] = kept

    def _optimized_parameters(self) -> Iterator[tuple[str, Tensor, tuple[int, dict[str, Any]]]]:
        """Parameters with their name, and their parameter group with its index; those not trained have no group."""
        groups = {
            id(stepped): (number, group)
            for number, group in enumerate(self.optimizer.param_groups)
            for stepped in group["params"]
        }
        for name, parameter in self._parameters.items():
            if (found := groups.get(id(self._stepped[name]))) is not None:
                yield name, parameter, found

    def _whole(self, value: Tensor) -> TensorSlice:
        """A tensor that is not laid out like its parameter, on one shard: every rank holds all of it."""
        return TensorSlice(value.reshape(-1), 0, value.shape, self.world.rank, self.world.size)

    def invalidate_gathered(self) -> None:
        for unit in self._units:
            unit.reshard()


def without_view(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's output as no view of another tensor (Swin's is one): an in-place addition would drop FSDP's hook."""
    output = forward(*args, **kwargs)
    if isinstance(output, Tensor) and output._is_view():
        return torch.ops.aten._unsafe_view(output, output.shape)
    return output


def rehearse_on_shards(spec: EngineSpec, mesh: DeviceMesh) -> None:
    """Makes sure that an optimizer computes on shards what it computes on whole tensors. Collective.

    Raises:
        UserError: it does not, or uses operations that DTensors do not have.
    """
    whole, sharded = (nn.Linear(4, 2 * mesh.size(-1) + 1, device=spec.world.device) for _ in range(2))
    with torch.no_grad():
        for parameter in [*whole.parameters(), *sharded.parameters()]:
            parameter.copy_(torch.linspace(-1.0, 2.0, parameter.numel(), device=parameter.device).view_as(parameter))
    fully_shard(sharded, mesh=mesh)
    optimizers = spec.optimizer(whole), spec.optimizer(sharded)
    name = type(optimizers[0]).__name__
    try:
        for _ in range(3):
            for module, optimizer in zip((whole, sharded), optimizers, strict=True):
                for parameter in module.parameters():
                    parameter.grad = parameter.detach().sin()
                optimizer.step()
        pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
        equal = all(torch.allclose(a, _sharded(b).full_tensor(), rtol=1e-4, atol=1e-6) for a, b in pairs)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"optimizer {name} cannot step FSDP2's shards ({reason}); one shard works") from error
    if not equal:
        raise UserError(f"optimizer {name} computes otherwise on FSDP2's shards than on whole tensors; one shard works")


def _sharded(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor), "fully_shard left a parameter unsharded"
    return parameter


def _local(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _slice(local: Tensor, parameter: Tensor) -> TensorSlice:
    """fully_shard cuts the first dimension like torch.chunk, over the mesh's last dimension; a first one replicates."""
    mesh, shape = _sharded(parameter).device_mesh, parameter.shape
    rows = -(-shape[0] // mesh.size(-1))  # of every rank but the last ones
    start = min(mesh.get_local_rank(-1) * rows, shape[0]) * shape[1:].numel()
    replica, replicas = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
    return TensorSlice(local.view(-1), start, shape, replica, replicas)


def _shard_like(local: Tensor, parameter: Tensor) -> DTensor:
    """This rank's part of a tensor that is sharded as the parameter is."""
    like = _sharded(parameter)
    # The global shape is given: from_local would guess it wrongly where the rows do not divide.
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
