"""What the training loop may ask of an engine, and what every engine does alike.

An engine takes a module and shards it over the ranks. It knows precision, gradient accumulation and clipping,
parameters and optimizer state; it must not know Vision Transformers, data or metrics.

Weights, fp32 unless `precision` says otherwise, leave an engine in three forms. *Local*: `{canonical name: this rank's
storage}`, the engine's own memory, which an EMA follows without communication. *Slices*: the same storage as ranges of
the whole tensors, the engine-independent form of checkpoints. *Full*: `{canonical name: whole tensor on the CPU}`, held
by rank 0, for weights files.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalevit.config.base import CompileMode, Precision
from scalevit.distributed import World
from scalevit.engines.clipping import Clipping
from scalevit.engines.optimizer_access import GroupCounters
from scalevit.engines.precision import DTYPES, LossScale, weight_dtype
from scalevit.engines.settings import UpdateScope
from scalevit.engines.state import OptimizerState, StateTensor, TensorSlice
from scalevit.tying import tied_names

CompilerBackend = str | Callable[..., Any]
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class EngineSpec:
    """What every engine is built from, beside its settings."""

    world: World
    blocks: Sequence[nn.Module]
    """The repeated parts of the module: the units of sharding and of recomputation."""
    optimizer: OptimizerFactory
    """Called with a module whose parameters the optimizer shall update, under the names of the plain module."""
    micro_batch: int
    accumulation: int
    precision: Precision
    update_scope: UpdateScope = "elements"
    """What the optimizer reads for an update; not more than `EngineSettings.update_scope` allows."""
    clipping: Clipping = field(default_factory=Clipping)
    activation_checkpointing: bool = False
    compile: CompilerBackend | None = None
    """Backend of torch.compile for the blocks; None runs them as they are."""
    compile_mode: CompileMode = "default"
    forms: int = 1
    """In how many forms the blocks are run, e.g. widths: each is a program of the compiler."""
    initial_values: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    """If given, the module is on the meta device and is filled shard by shard: yields every unique parameter and buffer
    by name, whole, on the CPU, the same on every rank."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; inf or nan where it overflowed."""
    skipped: bool
    """The gradient was not finite: no weight has changed."""


def compile_blocks(
    blocks: Sequence[nn.Module], backend: CompilerBackend, mode: CompileMode = "default", *, forms: int = 1
) -> None:
    """Compiles the forward of each block, in place.

    Args:
        forms: as in `EngineSpec`.
    """
    # Blocks with different drop-path rates, and training and evaluation, are separate programs; beyond the limit of 8
    # the compiler would run the rest uncompiled.
    programs, compiler = 4 * len(blocks) * forms, torch._dynamo.config
    compiler.recompile_limit = max(compiler.recompile_limit, programs)
    compiler.accumulated_recompile_limit = max(compiler.accumulated_recompile_limit, programs)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, mode=None if mode == "default" else mode)


class Engine(abc.ABC):
    """A sharded module with its optimizer. Every method is collective unless it says otherwise."""

    name: str
    optimizer: torch.optim.Optimizer
    autocasts: bool = True
    """Whether precision is automatic mixed precision around the module's forward; else the engine sets it up."""

    def __init__(self, module: nn.Module, spec: EngineSpec):
        self.world = spec.world
        self.spec = spec
        self.loss_scale = LossScale.for_precision(spec.precision)
        self.tied = tied_names(module)
        names = [name for name, _ in module.named_parameters()]
        if spec.initial_values is None:
            module.to(device=spec.world.device)
        if spec.precision == "bf16-weights":
            module.to(weight_dtype(spec.precision))
        # From the inside out:
        # 1. compilation: of a block's arithmetic only, so that the compiler traces no engine's hooks, and no name
        #    changes (compiling modules would add `_orig_mod` to names);
        # 2. recomputation, which restores the random state that the compiled block draws from, and runs it again;
        # 3. autocast around the whole forward, so that a recomputed block runs under it as the first time;
        # 4. sharding, which must gather and free what all of them run.
        if spec.compile is not None:
            compile_blocks(spec.blocks, spec.compile, spec.compile_mode, forms=spec.forms)
        if spec.activation_checkpointing:
            for block in spec.blocks:
                # Re-entrant checkpointing fails with shared modules: a gradient is then ready more than once.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if spec.precision != "fp32" and self.autocasts:
            module.forward = torch.autocast(spec.world.device.type, DTYPES[spec.precision])(module.forward)
        self.module = self._shard(module)
        self._check_tying(names)

    @abc.abstractmethod
    def _shard(self, module: nn.Module) -> nn.Module:
        """Wraps the module and builds the optimizer; returns the module whose parameters keep their names."""

    def _build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        optimizer = self.spec.optimizer(module)
        self.group_counters = GroupCounters(optimizer)
        self.spec.clipping.attach(optimizer)
        return optimizer

    def _check_tying(self, names: list[str]) -> None:
        """Wrapping must not untie, rename or drop a parameter: a broken tie silently trains a larger model."""
        missing = [name for name, tensor in self.module.named_parameters() if tensor.is_meta]
        assert not missing, f"{self.name} left {missing[:4]} without values"
        after = tied_names(self.module)
        assert after == self.tied, f"{self.name} broke the tying of {sorted(set(self.tied) ^ set(after))[:4]}"
        assert [name for name, _ in self.module.named_parameters()] == names, f"{self.name} renamed parameters"

    # --- a step ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """images (b, C, H, W) -> logits (b, classes); b is the same on every rank."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of one micro-batch; `last` marks the one that completes the accumulation.

        Args:
            loss: the micro-batch's part of the loss of the global batch: the sum over micro-batches and ranks is what
                is differentiated. Not scaled.
        """

    @abc.abstractmethod
    def step(self, lr: float) -> StepResult:
        """One optimizer step with the gradient summed over ranks and micro-batches, then zeroes it.

        Args:
            lr: of parameter groups without an `lr_scale`; the others take it times that (timm's layer decay).
        """

    @staticmethod
    def _set_lr(groups: list[dict[str, Any]], lr: float) -> None:
        for group in groups:
            group["lr"] = lr * group["lr_scale"] if "lr_scale" in group else lr

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    # --- state ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def local_parameters(self) -> dict[str, Tensor]:
        """This rank's storage of every unique parameter. Not collective. Changing it changes the weights; call
        `invalidate_gathered` or `commit_parameters` afterwards."""

    @abc.abstractmethod
    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors laid out like `local_parameters` -> full ones on rank 0's CPU ({} elsewhere)."""

    @abc.abstractmethod
    def slices(self, local: Mapping[str, Tensor]) -> dict[str, TensorSlice]:
        """Tensors laid out like `local_parameters`, as views that know which range they are. Not collective."""

    @abc.abstractmethod
    def optimizer_state_layout(self, tensors: Mapping[str, StateTensor]) -> dict[str, dict[str, TensorSlice]]:
        """The ranges that this rank keeps of an optimizer's tensors, uninitialised, on the CPU. Not collective.

        Args:
            tensors: by name, as `OptimizerState.describe` returns them.
        """

    @abc.abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state, with views of its tensors where they are in memory. Not collective."""

    @abc.abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Replaces the optimizer's state by one whose slices are laid out as by `optimizer_state_layout`."""

    def invalidate_gathered(self) -> None:  # noqa: B027 (most engines hold no copy)
        """To be called when local parameters were changed from outside, for a while: drops gathered copies of them."""

    def commit_parameters(self) -> None:
        """To be called when local parameters were changed from outside for good: training continues from them."""
        self.invalidate_gathered()

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Swaps the model's local weights with others (e.g. the EMA's) for the duration of the block.

        Where both have the same type no copy is made: meanwhile `weights` holds the model's own. Afterwards both are as
        before, bit for bit.
        """
        own = self.local_parameters()
        # An exchange with weights of 16 bits would round an average of 32: of that a rounded copy is exchanged.
        weights = {name: tensor.to(own[name].dtype) for name, tensor in weights.items()}
        _swap(own, weights)
        self.invalidate_gathered()
        try:
            yield
        finally:
            _swap(self.local_parameters(), weights)
            self.invalidate_gathered()

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Releases what would outlive the engine in a process that continues without it."""


@torch.no_grad()
def _swap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Exchanges the contents of two sets of tensors, with memory for one more tensor."""
    for name, tensor in one.items():
        kept = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(kept)
