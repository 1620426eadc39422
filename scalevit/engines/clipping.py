"""Gradient clipping by timm's three modes (`timm.utils.dispatch_clip_grad`). Must not know engines or models."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

from scalevit.config.base import ClipMode

# Of timm's adaptive_clip_grad: lower bounds of a parameter's norm and of a gradient's.
_LEAST_NORM, _LEAST_GRADIENT = 1e-3, 1e-6


@dataclass(frozen=True)
class Clipping:
    """What is done to the gradient before an optimizer step; it has no loss scale by then."""

    limit: float | None = None
    """None does not clip."""
    mode: ClipMode = "norm"
    """norm: `limit` bounds the global norm; value: each element; agc: the norm of each row (unit) of a gradient, as a
    fraction of the norm of the weights in it."""
    exempt: frozenset[str] = frozenset()
    """Names of parameters that "agc" does not clip."""

    @property
    def largest_norm(self) -> float | None:
        """Limit of the global norm; None where there is none."""
        return self.limit if self.mode == "norm" else None

    def factor(self, grad_norm: float) -> float:
        """The factor for a gradient of that global norm, as in torch.nn.utils.clip_grad_norm_ and DeepSpeed."""
        return 1.0 if self.largest_norm is None else min(1.0, self.largest_norm / (grad_norm + 1e-6))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Mode "value": has every step of the optimizer clip what it steps first, also where it steps shards."""
        if self.mode == "value" and self.limit is not None:
            limit = self.limit

            def clip(stepped: torch.optim.Optimizer, *_: object) -> None:
                parameters = [parameter for group in stepped.param_groups for parameter in group["params"]]
                torch.nn.utils.clip_grad_value_(parameters, limit)

            optimizer.register_step_pre_hook(clip)

    def clip_units(
        self, gradients: Iterable[tuple[str, Tensor, Tensor]], sum_over_shards: Callable[[Tensor], None] | None = None
    ) -> None:
        """Mode "agc": clips gradients in place; does nothing in other modes.

        Args:
            gradients: name, parameter and gradient, whole tensors or this rank's shards of whole rows.
            sum_over_shards: adds up a tensor over the ranks that hold the shards, in place; None where tensors are
                whole.
        """
        if self.mode != "agc" or self.limit is None:
            return
        clipped = [(parameter, gradient) for name, parameter, gradient in gradients if name not in self.exempt]
        # A vector is one unit (timm's `unitwise_norm`): all shards of it.
        vectors = [pair for pair in clipped if pair[0].ndim <= 1 and sum_over_shards is not None]
        whole = [pair for pair in clipped if pair[0].ndim > 1 or sum_over_shards is None]
        adaptive_clip_grad([_with_gradient(*pair) for pair in whole], clip_factor=self.limit)
        if vectors and sum_over_shards is not None:
            _clip_vectors(vectors, self.limit, sum_over_shards)


def _with_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A leaf that timm's function takes; it shares the memory of both."""
    leaf = parameter.detach()
    leaf.grad = gradient
    return leaf


@torch.no_grad()
def _clip_vectors(
    vectors: list[tuple[Tensor, Tensor]], factor: float, sum_over_shards: Callable[[Tensor], None]
) -> None:
    """timm's `adaptive_clip_grad` of vectors of which every rank holds a part: one collective for all of them."""
    parameters, gradients = [parameter.detach() for parameter, _ in vectors], [gradient for _, gradient in vectors]
    squares = torch.stack(torch._foreach_norm([*parameters, *gradients])).square()
    sum_over_shards(squares)
    of_parameters, of_gradients = squares.sqrt().chunk(2)
    limits = of_parameters.clamp(min=_LEAST_NORM) * factor
    factors = torch.where(of_gradients < limits, 1.0, limits / of_gradients.clamp(min=_LEAST_GRADIENT))
    torch._foreach_mul_(gradients, list(factors.unbind()))
