"""PyTorch FSDP2: `fully_shard` over the blocks, shared modules as units of their own."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from scalevit.config import FsdpConfig
from scalevit.engines.base import Engine, Setup, StepResult, clip_factor, step_counter
from scalevit.engines.pieces import Moments, Piece
from scalevit.tying import shared_modules


class FsdpEngine(Engine):
    """`fully_shard` with fp32 weights; bf16 and fp16 come from autocast inside the module."""

    name = "fsdp"

    def __init__(self, module: nn.Module, setup: Setup, settings: FsdpConfig):
        self.settings = settings
        super().__init__(module, setup)

    def _shard(self, module: nn.Module) -> nn.Module:
        # The mesh is explicit: fully_shard's default mesh looks for a GPU.
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        # A parameter may belong to one unit only. A module that several blocks share becomes a unit first, and stays
        # gathered between its uses; the blocks then leave its parameters alone.
        for shared in shared_modules(self.setup.blocks):
            fully_shard(shared, mesh=mesh, reshard_after_forward=False)
            self._reduce_once(shared)
        for block in self.setup.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.settings.reshard_after_forward)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        assert isinstance(module, FSDPModule)
        self._root = module
        self._units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        if self.world.device.type == "cpu":
            for unit in self._units:
                # gloo has no averaging reduction: sum, and divide in FSDP's own code.
                unit.set_force_sum_reduction_for_comms(True)
        self.optimizer = self.setup.optimizer(module)
        return module

    def _reduce_once(self, shared: nn.Module) -> None:
        """FSDP reduces and frees a unit after the backward of each of its uses: let it wait for the last of them."""
        assert isinstance(shared, FSDPModule)
        uses = sum(shared in block.modules() for block in self.setup.blocks)
        left = 0

        def before_backward(unit: nn.Module, gradient: object) -> None:
            nonlocal left
            left = (left or uses) - 1
            shared.set_requires_gradient_sync(self._last and left == 0, recurse=False)
            shared.set_reshard_after_backward(left == 0, recurse=False)

        shared.register_full_backward_pre_hook(before_backward)

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._last = last
        self._root.set_requires_gradient_sync(last)
        (loss * (self.loss_scale.value / self.setup.accumulation)).backward()

    def step(self, lr: float) -> StepResult:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        grad_norm = norm.item() / self.loss_scale.value
        finite = grad_norm < float("inf")  # false for nan too
        if finite:
            factor = clip_factor(grad_norm, self.setup.clip_grad_norm) / self.loss_scale.value
            if factor != 1.0:
                torch._foreach_mul_([_local(gradient) for gradient in gradients], factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(overflow=not finite)
        return StepResult(grad_norm, skipped=not finite)

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
                "step": step_counter(self.optimizer, moments.steps, self.world.device),
                "exp_avg": _shard_like(exp_avg, parameter),
                "exp_avg_sq": _shard_like(exp_avg_sq, parameter),
            }

    def refresh(self) -> None:
        for unit in self._units:
            unit.reshard()


def _sharded(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor), "fully_shard left a parameter unsharded"
    return parameter


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _piece(local: Tensor, parameter: nn.Parameter) -> Piece:
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
