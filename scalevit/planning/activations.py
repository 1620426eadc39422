"""What one micro-batch keeps and moves, counted in the real model's forward and backward on tensors without data.

The model is built on the meta device and run under `FakeTensorMode`, where operators compute shapes only. So every
timm Vision Transformer is counted without a formula of its own. Knows models and the fused operator; must not know
engines' sharding, ranks or data.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from scalevit.config.base import Precision
from scalevit.config.model import KernelsConfig, ModelConfig
from scalevit.engines.precision import DTYPES, weight_dtype
from scalevit.models.build import build_model
from scalevit.models.fused_mlp import FusedGatedMlp, FusedMlp, FusedPackedGatedMlp
from scalevit.models.mlps import transformer_blocks
from scalevit.models.reductions.base import Reduction

Mode = Literal["eager", "fast", "lean", "recompute"]
MODES: tuple[Mode, ...] = ("eager", "fast", "lean", "recompute")
"""How an MLP is computed: eager PyTorch, or the fused kernels with a save mode."""


@dataclass(frozen=True)
class Trace:
    """One forward and backward of one micro-batch, without weights and their gradients."""

    peak_bytes: float
    """The most bytes allocated at any time, including images and temporaries."""
    flops: float
    """Of matrix products and attention, including what is recomputed."""
    traffic_bytes: float
    """Read and written by all operators except matrix products, attention and fused kernels."""


class TracedModel:
    """A reduced model on tensors without data, whose micro-batches are counted.

    Args:
        model: as configured.
        reduction: of its MLPs.
        mode: how MLPs are computed.
        precision: of the forward.
        activation_checkpointing: whether blocks are recomputed in the backward.

    Raises:
        UserError: as `build_model`.
    """

    def __init__(
        self,
        model: ModelConfig,
        reduction: Reduction,
        *,
        mode: Mode,
        precision: Precision,
        activation_checkpointing: bool,
    ) -> None:
        self._model, self._precision = model, precision
        kernels = None if mode == "eager" else KernelsConfig(mlp="auto", save=mode)
        shapes = model.without_weights()
        network = build_model(shapes, reduction, seed=0, device="meta", kernels=kernels)
        network.to(weight_dtype(precision))
        if activation_checkpointing:
            for block in transformer_blocks(network):
                # As the engines do, except for the random state, which shapes do not depend on.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        for module in network.modules():
            if isinstance(module, FusedMlp):
                module.forward = partial(_fused_forward, module)  # type: ignore[method-assign]
        with FakeTensorMode():
            for module in network.modules():  # `Module.to_empty` cannot swap fake tensors reliably
                for name, parameter in module.named_parameters(recurse=False):
                    fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                    fake.grad = torch.empty_like(
                        fake
                    )  # allocated before: the engine's cost counts it, like the weights
                    setattr(module, name, fake)
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        self._network = network.train()

    def saved_bytes(self, images: int) -> float:
        """Storages that the forward keeps for the backward, including autocast's 16-bit copies of the weights."""
        # A run of its own: with hooks on saved tensors, checkpointing would free what it recomputed much later.
        with _fake_mode(self._network), saved_bytes(self._network) as saved:
            self._loss(*self._batch(images))
        return saved.bytes

    def trace(self, images: int) -> Trace:
        """One micro-batch, run on shapes."""
        return self._trace(images)[0]

    def costs(self, images: int) -> Trace:
        """What `trace` returns, from two traces for all sizes."""
        return self.trace(images) if images < 2 else self._lines.at(images)

    @cached_property
    def _lines(self) -> "_Lines":
        return _Lines(*self._trace(2), *self._trace(3))

    def _trace(self, images: int) -> tuple[Trace, np.ndarray]:
        """The trace of one micro-batch, and the bytes allocated at each operator."""
        with _fake_mode(self._network):
            batch, targets = self._batch(images)
            with CostCounter() as costs:
                self._loss(batch, targets).backward()
        live = np.array(costs.live_at, np.int64) + batch.nbytes + targets.nbytes
        return Trace(float(live.max()), costs.flops, costs.traffic), live

    def _batch(self, images: int) -> tuple[Tensor, Tensor]:
        model = self._model
        shape = images, model.in_chans, model.image_size, model.image_size
        return torch.empty(shape), torch.empty(images, model.num_classes)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        dtype = weight_dtype(self._precision)
        casts = DTYPES[self._precision] != dtype
        with torch.autocast("cpu", DTYPES[self._precision], enabled=casts):
            logits = self._network(images.to(dtype))
        return F.cross_entropy(logits.float(), targets)


@dataclass(frozen=True)
class _Lines:
    """Costs of micro-batches of two images and more, from those of two and three.

    From two images on the operators are the same, and what each allocates, computes and moves is linear in the images.
    So are the bytes in use at each operator, of which the peak is the largest.
    """

    two: Trace
    live_two: np.ndarray
    three: Trace
    live_three: np.ndarray

    def at(self, images: int) -> Trace:
        more = images - 2

        def on_line(first: Any, second: Any) -> Any:
            return first + more * (second - first)

        return Trace(
            peak_bytes=float(on_line(self.live_two, self.live_three).max()),
            flops=on_line(self.two.flops, self.three.flops),
            traffic_bytes=on_line(self.two.traffic_bytes, self.three.traffic_bytes),
        )


@contextmanager
def _fake_mode(network: nn.Module) -> Iterator[None]:
    """The mode of a network's fake tensors. Without garbage collection: when it runs would decide what is allocated."""
    parameter = next(network.parameters())
    assert isinstance(parameter, FakeTensor)
    gc.disable()
    try:
        with parameter.fake_mode:
            yield
    finally:
        gc.enable()


def _fused_forward(module: FusedMlp, x: Tensor) -> Tensor:
    """The fused operator itself: its function would fall back to eager PyTorch, as no kernel runs on this device."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled("cpu"):
        rows = rows.to(torch.get_autocast_dtype("cpu"))
    operators: Any = torch.ops.scalevit
    fc2 = module.fc2
    last = (fc2.weight, fc2.bias, module.hidden, module.activation, module.save)
    if isinstance(module, FusedPackedGatedMlp):
        first = (module.fc1.weight, module.fc1.bias, None, None)
        y, _, _ = operators.fused_gated_mlp(rows, *first, *last, module.gate_last, [False] * 3)
    elif isinstance(module, FusedGatedMlp):
        separate = (module.fc1_g.weight, module.fc1_g.bias, module.fc1_x.weight, module.fc1_x.bias)
        y, _, _ = operators.fused_gated_mlp(rows, *separate, *last, False, [False] * 3)
    else:
        y, _, _ = operators.fused_mlp(rows, module.fc1.weight, module.fc1.bias, *last, False, False)
    return module.drop2(y.reshape(*x.shape[:-1], fc2.out_features))


def _fused_flops(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any, **named: Any) -> int:
    """Two FLOPs per weight and token."""
    return 2 * x.shape[0] * (w1.numel() + w2.numel())


def _fused_backward_flops(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    saved_post: Tensor,
    saved: Tensor,
    *rest: Any,
    **named: Any,
) -> int:
    """Two products for each of the forward's, and fc1 once more if nothing of its output was saved."""
    again = 0 if saved.numel() else 2 * x.shape[0] * w1.numel()
    return 2 * _fused_flops(x, w1, b1, w2) + again


def _gated_flops(
    x: Tensor, w1: Tensor, b1: Tensor | None, value: Tensor | None, bias: Any, w2: Tensor, *rest: Any, **named: Any
) -> int:
    return 2 * x.shape[0] * sum(weight.numel() for weight in (w1, value, w2) if weight is not None)


def _gated_backward_flops(dy: Tensor, x: Tensor, *forward: Any, **named: Any) -> int:
    """As of the plain MLP."""
    w2, saved = forward[4], forward[6]
    again = 0 if saved.numel() else _gated_flops(x, *forward[:5]) - 2 * x.shape[0] * w2.numel()
    return 2 * _gated_flops(x, *forward[:5]) + again


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(dy.shape, q.shape, k.shape, v.shape)


# Operators bound by the matrix units; all others are bound by memory. torch 2.11's table lacks our operators and the
# CPU's attention.
_FLOPS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.scalevit.fused_mlp: _fused_flops,
    torch.ops.scalevit.fused_mlp_backward: _fused_backward_flops,
    torch.ops.scalevit.fused_gated_mlp: _gated_flops,
    torch.ops.scalevit.fused_gated_mlp_backward: _gated_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _internal_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of the buffers that a fused operator allocates and frees internally, where no dispatch sees them.

    Of the gated ones at most: a plan may compute fc1 by the library, which writes gate and value first.
    """
    operators: Any = torch.ops.scalevit
    weights: tuple[Tensor | None, ...]
    if func == operators.fused_mlp.default:
        x, weights, width, save = args[0], (args[1], args[3]), args[5], args[7]
        hidden = 0 if save == "fast" else 1  # the post-activation, if it is not saved
    elif func == operators.fused_mlp_backward.default:
        x, weights, width, save = args[1], (args[2], args[4]), args[7], args[9]
        hidden = {"fast": 1, "lean": 2, "recompute": 3}[save]  # the gradient, and what was not saved
    elif func == operators.fused_gated_mlp.default:
        x, weights, width, save = args[0], (args[1], args[3], args[5]), args[7], args[9]
        hidden = {"fast": 0, "lean": 1}.get(save, 3)
    elif func == operators.fused_gated_mlp_backward.default:
        x, weights, width, save = args[1], (args[2], args[4], args[6]), args[9], args[11]
        hidden = {"fast": 3, "lean": 4, "recompute": 6}[save]  # three gradients, and what was not saved
    else:
        return 0
    cast = sum(weight.numel() for weight in weights if weight is not None and weight.dtype != x.dtype)
    return x.element_size() * (hidden * x.shape[0] * width + cast)


def storage_key(tensor: Tensor | torch.UntypedStorage) -> int:
    """Identifies a storage while it is allocated; the same for all tensors that are views of it.

    `_cdata` is private to torch. The public `data_ptr` cannot replace it: it is 0 for tensors without data.
    """
    storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else tensor
    return storage._cdata


@dataclass
class SavedBytes:
    """A count that is complete when its block has ended."""

    bytes: int = 0


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[SavedBytes]:
    """Counts the unique storages that autograd saves in the block's forward, without the module's parameters."""
    parameters = {storage_key(parameter) for parameter in module.parameters()}
    kept: dict[int, Any] = {}  # holds the storages: a freed one's key could be reused
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key not in parameters:
            kept[key] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    saved.bytes = sum(storage.nbytes() for storage in kept.values())


class CostCounter(TorchDispatchMode):
    """Counts FLOPs, bytes read and written, and the storages that operators allocate while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.flops = self.traffic = 0
        self.live_at: list[int] = []
        """Bytes allocated at the end of each operator, with its internal buffers."""
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {storage_key(tensor) for tensor in inputs}
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            key = storage_key(tensor)
            if key not in self._alive and key not in before:
                self._follow(tensor.untyped_storage())
        self.live_at.append(self.live + _internal_bytes(func, args))
        if (count := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        elif not func.is_view:
            self.traffic += sum(tensor.nbytes for tensor in [*inputs, *results])
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        self._alive.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size
