"""PyTorch FSDP2: `fully_shard` over the blocks; blocks that share a module are one unit."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from scalevit.engines.base import DTYPES, Engine, Setup, StepResult, clip_factor, step_counter
from scalevit.engines.fsdp.settings import FsdpSettings
from scalevit.engines.state import Moments, Piece
from scalevit.tying import connected_units


class FsdpEngine(Engine):
    """`fully_shard` with fp32 weights; bf16 and fp16 come from autocast inside the module, or from FSDP2's policy."""

    name = "fsdp"

    def __init__(self, module: nn.Module, setup: Setup, settings: FsdpSettings):
        self.settings = settings
        self.autocasts = settings.mixed_precision == "autocast"
        super().__init__(module, setup)

    def _shard(self, module: nn.Module) -> nn.Module:
        self._mesh = self._build_mesh()
        own = self.settings.reshard_after_forward
        # A parameter may belong to one unit only. Blocks that share a module are one unit together: it is gathered
        # before the first of them runs and freed after the last, and its gradient is reduced when all have added to it.
        self._units = [
            self._fully_shard(blocks, reshard_after_forward=own) for blocks in connected_units(self.setup.blocks)
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
        if self.setup.initial_values is not None:
            self._materialise(module, self.setup.initial_values())
        self.optimizer = self.setup.optimizer(module)
        return module

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
                piece = _piece(target.to_local(), target)
                piece.values.copy_(whole.flatten()[piece.start :][: piece.values.numel()])
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
        if self.settings.mixed_precision == "policy":
            # An output in fp32 from the root alone: a LayerNorm with bf16 weights takes no fp32 input.
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=DTYPES[self.setup.precision], reduce_dtype=torch.float32, output_dtype=output_dtype
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

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients stay whole on each rank until the accumulation is complete, and are then reduced once.
        self._root.set_requires_gradient_sync(last)
        if not self.settings.reshard_after_forward:
            self._root.set_reshard_after_backward(last)
        (loss * (self.loss_scale.value / self.setup.accumulation)).backward()

    def step(self, lr: float) -> StepResult:
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        grad_norm = self._norm(gradients) / self.loss_scale.value
        finite = grad_norm < float("inf")  # false for nan too
        if finite:
            factor = clip_factor(grad_norm, self.setup.clip_grad_norm) / self.loss_scale.value
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(overflow=not finite)
        return StepResult(grad_norm, skipped=not finite)

    def _norm(self, gradients: list[Tensor]) -> float:
        """Global L2 norm of this rank's parts: one number crosses between the ranks that share a copy."""
        squared = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self.world.device)
        dist.all_reduce(squared, group=self._mesh.get_group("shard"))
        return squared.sqrt().item()

    # --- state ----------------------------------------------------------------------------------------------

    def local_parameters(self) -> dict[str, Tensor]:
        for unit in self._units:
            unit.reshard()  # units that stay gathered after a forward without backward show no shards
        return {name: _sharded(p).to_local().detach() for name, p in self.module.named_parameters()}

    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = {}
        for name, parameter in self.module.named_parameters():
            whole = _shard_like(local[name], parameter).full_tensor()
            if self.world.is_first:
                full[name] = whole.cpu()
        return full

    def pieces(self, local: Mapping[str, Tensor]) -> dict[str, Piece]:
        return {name: _piece(local[name], parameter) for name, parameter in self.module.named_parameters()}

    def moment_pieces(self) -> dict[str, Piece]:
        return {name: piece.empty_like() for name, piece in self.pieces(self.local_parameters()).items()}

    def moments(self) -> Moments:
        self.refresh()  # AdamW keeps its state by the shards
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.module.named_parameters()}
        if not all(states.values()):
            return Moments(0, {}, {})  # before the first step
        exp_avg, exp_avg_sq = (
            self.pieces({name: _local(state[key]) for name, state in states.items()})
            for key in ("exp_avg", "exp_avg_sq")
        )
        return Moments(int(next(iter(states.values()))["step"]), exp_avg, exp_avg_sq)

    def load_moments(self, moments: Moments) -> None:
        self.optimizer.state.clear()
        if not moments.steps:
            return
        for name, parameter in self.module.named_parameters():
            local = _sharded(parameter).to_local()
            exp_avg, exp_avg_sq = (
                kept[name].values.view(local.shape).to(local.device, copy=True)
                for kept in (moments.exp_avg, moments.exp_avg_sq)
            )
            self.optimizer.state[parameter] = {
                "step": step_counter(self.optimizer, moments.steps, local.device),
                "exp_avg": _shard_like(exp_avg, parameter),
                "exp_avg_sq": _shard_like(exp_avg_sq, parameter),
            }

    def refresh(self) -> None:
        for unit in self._units:
            unit.reshard()


def _sharded(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor), "fully_shard left a parameter unsharded"
    return parameter


def _local(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _piece(local: Tensor, parameter: Tensor) -> Piece:
    """fully_shard cuts the first dimension like torch.chunk, over the mesh's last dimension; a first one replicates."""
    mesh, shape = _sharded(parameter).device_mesh, parameter.shape
    rows = -(-shape[0] // mesh.size(-1))  # of every rank but the last ones
    start = min(mesh.get_local_rank(-1) * rows, shape[0]) * shape[1:].numel()
    replica, replicas = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
    return Piece(local.view(-1), start, shape, replica, replicas)


def _shard_like(local: Tensor, parameter: nn.Parameter) -> DTensor:
    """This rank's part of a tensor that is sharded as the parameter is."""
    like = _sharded(parameter)
    # The global shape is given: from_local would guess it wrongly where the rows do not divide.
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
