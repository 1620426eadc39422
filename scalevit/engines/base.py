"""What the training loop may ask of an engine, and what every engine does alike.

An engine takes a module and shards it over the ranks. It knows precision, gradient accumulation and clipping,
parameters and optimizer state; it must not know Vision Transformers, data or metrics.

Weights leave an engine in three forms. *Local*: `{canonical name: this rank's fp32 storage}`, the real thing, which an
EMA follows without communication. *Pieces*: the same storage as ranges of the whole tensors, the engine-independent
form of checkpoints. *Full*: `{canonical name: whole fp32 tensor on the CPU}`, held by rank 0, for weights files.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalevit.distributed import World
from scalevit.engines.state import Moments, Piece
from scalevit.tying import tied_names

Precision = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CompilerBackend = str | Callable[..., Any]
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Setup:
    """What every engine is built from."""

    world: World
    blocks: Sequence[nn.Module]
    """The repeated parts of the module: the units of sharding and of recomputation."""
    optimizer: OptimizerFactory
    """Called once, with the module whose parameters the optimizer shall update, names as in the plain module."""
    micro_batch: int
    accumulation: int
    precision: Precision
    clip_grad_norm: float | None = None
    activation_checkpointing: bool = False
    compile: CompilerBackend | None = None
    """Backend of torch.compile for the blocks; None runs them as they are."""
    initial_values: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    """Given, the module lies on the meta device and is filled shard by shard: yields every unique parameter and buffer
    by name, whole, on the CPU, the same on every rank."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: float
    """Global L2 norm of the averaged gradient before clipping; inf or nan where it overflowed."""
    skipped: bool
    """The gradient was not finite: no weight has changed."""


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), with torch.amp.GradScaler's numbers."""

    value: float = 1.0
    grown_steps: int = 0
    enabled: bool = False

    def update(self, overflow: bool, growth_interval: int = 2000) -> None:
        if not self.enabled:
            return
        if overflow:
            self.value, self.grown_steps = max(self.value / 2, 1.0), 0
        else:
            self.grown_steps += 1
            if self.grown_steps == growth_interval:
                self.value, self.grown_steps = self.value * 2, 0


def clip_factor(grad_norm: float, limit: float | None) -> float:
    """What a gradient of that norm is multiplied by, as torch.nn.utils.clip_grad_norm_ and DeepSpeed do."""
    return 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))


def step_counter(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> Tensor:
    """AdamW's step count as the tensor that it keeps per parameter: beside the weights where it is fused."""
    fused = optimizer.defaults.get("fused")
    return torch.tensor(float(steps), device=device if fused else "cpu")


def _compile(blocks: Sequence[nn.Module], backend: CompilerBackend) -> None:
    """Compiles the forward of each block, in place."""
    # Blocks with another rate of drop-path, and training and evaluation, are programs of their own; beyond the limit
    # of 8 the compiler would run the rest uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)


class Engine(abc.ABC):
    """A sharded module with its optimizer. Every method is collective unless it says otherwise."""

    name: str
    autocasts: bool = True
    """Whether precision is automatic mixed precision around the module's forward; else the engine sees to it."""

    def __init__(self, module: nn.Module, setup: Setup):
        self.world = setup.world
        self.setup = setup
        self.loss_scale = LossScale()
        if setup.precision == "fp16":
            self.loss_scale = LossScale(value=2.0**16, enabled=True)
        self.tied = tied_names(module)
        names = [name for name, _ in module.named_parameters()]
        if setup.initial_values is None:
            module.to(device=setup.world.device)
        # From the inside out:
        # 1. compilation: a block's arithmetic alone, so that no engine's hook lies in what the compiler traces, and no
        #    name changes (compiling modules would put `_orig_mod` into them);
        # 2. recomputation, which restores the random state that the compiled block draws from, and runs it again;
        # 3. autocast around the whole forward, so that a recomputed block sees it as it was;
        # 4. sharding, which must gather and free what all of them run.
        if setup.compile is not None:
            _compile(setup.blocks, setup.compile)
        if setup.activation_checkpointing:
            for block in setup.blocks:
                # Re-entrant checkpointing fails with shared modules: a gradient is then ready more than once.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if setup.precision != "fp32" and self.autocasts:
            module.forward = torch.autocast(setup.world.device.type, DTYPES[setup.precision])(module.forward)
        self.module = self._shard(module)
        self._check_tying(names)

    @abc.abstractmethod
    def _shard(self, module: nn.Module) -> nn.Module:
        """Wraps the module and builds the optimizer; returns the module whose parameters keep their names."""

    def _check_tying(self, names: list[str]) -> None:
        """Wrapping must not untie, rename or drop a parameter: a broken tie trains a larger model in silence."""
        missing = [name for name, tensor in self.module.named_parameters() if tensor.is_meta]
        assert not missing, f"{self.name} left {missing[:4]} without values"
        after = tied_names(self.module)
        assert after == self.tied, f"{self.name} broke the tying of {sorted(set(self.tied) ^ set(after))[:4]}"
        assert [name for name, _ in self.module.named_parameters()] == names, f"{self.name} renamed parameters"

    # --- a step ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """images (b, C, H, W) -> logits (b, classes); b is the same on every rank."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of one micro-batch; `last` says that it completes the accumulation.

        Args:
            loss: mean over the micro-batch, neither divided by the accumulation nor scaled.
        """

    @abc.abstractmethod
    def step(self, lr: float) -> StepResult:
        """One optimizer step with the gradient averaged over ranks and micro-batches, then zeroes it."""

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    # --- state ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def local_parameters(self) -> dict[str, Tensor]:
        """This rank's storage of every unique parameter, fp32. Not collective. Changing it changes the weights; call
        `refresh` afterwards."""

    @abc.abstractmethod
    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors laid out like `local_parameters` -> full ones on rank 0's CPU ({} elsewhere)."""

    @abc.abstractmethod
    def pieces(self, local: Mapping[str, Tensor]) -> dict[str, Piece]:
        """Tensors laid out like `local_parameters`, as views that know which range they are. Not collective."""

    @abc.abstractmethod
    def moment_pieces(self) -> dict[str, Piece]:
        """The ranges of which this rank keeps AdamW's moments, by parameter name, not filled. Not collective."""

    @abc.abstractmethod
    def moments(self) -> Moments:
        """The optimizer's state; without pieces before the first step. Not collective."""

    @abc.abstractmethod
    def load_moments(self, moments: Moments) -> None:
        """Takes over a state whose pieces are laid out like `moment_pieces`."""

    def refresh(self) -> None:  # noqa: B027 (most engines hold no copy)
        """Tells the engine that local parameters were changed from outside, for a while."""

    def adopt_weights(self) -> None:
        """Tells the engine that local parameters were changed from outside, and that training goes on from them."""
        self.refresh()

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Runs a block with other local weights (an EMA's) in the place of the own ones.

        Both change places, so that no further copy of the weights is held: meanwhile `weights` holds the own ones.
        Afterwards both are as before, bit for bit.
        """
        own = self.local_parameters()
        _swap(own, weights)
        self.refresh()
        try:
            yield
        finally:
            _swap(self.local_parameters(), weights)
            self.refresh()

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Lets go of what would outlive the engine in a process that goes on without it."""


@torch.no_grad()
def _swap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Exchanges the contents of two sets of tensors, with room for one tensor more."""
    for name, tensor in one.items():
        kept = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(kept)
