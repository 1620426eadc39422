"""The cases of the tests of gated MLPs, on the interpreter and on a device; run and judged as in `kernel_cases`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from error_bounds import gated_error_bounds
from kernel_cases import DTYPES, SAVES, Case, lay_out
from scalevit.kernels import eager_gated_mlp, eager_packed_gated_mlp, fused_gated_mlp, fused_packed_gated_mlp
from scalevit.kernels.reference import in_fp64

SEPARATE = ("x", "gate_weight", "gate_bias", "value_weight", "value_bias", "fc2_weight", "fc2_bias")
PACKED = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
# How gate and value lie: as two weights, or as the halves of one.
FORMS = ("separate", "gate_first", "gate_last")


@dataclass(frozen=True)
class GatedCase(Case):
    """One gated MLP problem. biases: of the gate (if packed: of fc1), of fc2 and of the value."""

    rows: tuple[int, ...] = (21,)
    d: int = 48
    h: int = 48
    d_out: int = 16
    activation: str = "silu"
    biases: tuple[bool, bool] | tuple[bool, bool, bool] = (True, True, True)
    form: str = "separate"

    def __str__(self) -> str:
        return f"{self.form}-{super().__str__()}"

    @property
    def packed(self) -> bool:
        return self.form != "separate"

    @property
    def options(self) -> dict:
        return super().options | ({"gate_last": self.form == "gate_last"} if self.packed else {})

    @property
    def names(self) -> tuple[str, ...]:
        return PACKED if self.packed else SEPARATE

    def arguments(self, device: str = "cpu", seed: int = 0) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, self.dtype).requires_grad_()

        x = lay_out(normal(*self.rows, self.d).detach(), self.layout).requires_grad_()
        rows = 2 * self.h if self.packed else self.h
        gate_bias, fc2_bias, *value_bias = self.biases
        layers = []
        for has_bias in (gate_bias,) if self.packed else (gate_bias, *value_bias):
            layers.append(normal(rows, self.d, scale=self.scale * self.d**-0.5))
            layers.append(normal(rows, scale=self.scale) if has_bias else None)
        return [x, *layers, normal(self.d_out, self.h, scale=self.h**-0.5), normal(self.d_out) if fc2_bias else None]

    def fused(self, *arguments: Tensor | None, **options) -> Tensor:
        return (fused_packed_gated_mlp if self.packed else fused_gated_mlp)(*arguments, **options)

    def eager(self, *arguments: Tensor | None, **options) -> Tensor:
        return (eager_packed_gated_mlp if self.packed else eager_gated_mlp)(*arguments, **options)

    def reference(self, *arguments: Tensor | None, **options) -> Tensor:
        return in_fp64(self.eager, *arguments, **options)

    def bounds(self, arguments: list[Tensor | None], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        options = {"width": self.width, "activation": self.activation, "dtype": dtype}
        if not self.packed:
            return gated_error_bounds(arguments, dy, **options)
        x, w1, b1, w2, b2 = arguments
        parts = [(None, None) if t is None else t.detach().chunk(2) for t in (w1, b1)]
        first, second = zip(*parts, strict=True)
        layers = (*second, *first) if self.form == "gate_last" else (*first, *second)
        y, dx, *rest = gated_error_bounds([x, *layers, w2, b2], dy, **options)
        count = 1 if b1 is None else 2
        halves = (rest[count : 2 * count], rest[:count])
        pairs = zip(*(halves if self.form == "gate_last" else reversed(halves)), strict=True)
        return [y, dx, *(torch.cat(pair) for pair in pairs), *rest[2 * count :]]

    def tails(self, gradients: list[Tensor]) -> list[Tensor]:
        """Of gradients with all biases."""
        *layers, dw2, _ = gradients
        halves = [half for t in layers for half in (t.chunk(2) if self.packed else (t,))]
        return [*(half[self.width :] for half in halves), dw2[:, self.width :]]


# Every dtype with every save mode; activations and forms take turns, so that each meets each.
MIXED = [
    GatedCase(
        dtype=dtype, save=save, activation=("silu", "gelu", "gelu_tanh")[(i + j) % 3], form=FORMS[(i + 2 * j) % 3]
    )
    for (i, dtype), (j, save) in itertools.product(enumerate(DTYPES), enumerate(SAVES))
]
NARROW = [
    GatedCase(width=width, dtype=dtype, save=save, form=form)
    for width, dtype, save, form in (
        (16, torch.bfloat16, "fast", "gate_first"), (32, torch.float32, "lean", "gate_last"),
        (32, torch.bfloat16, "recompute", "separate"), (48, torch.float16, "lean", "gate_first"),
    )
]  # fmt: skip
GATED_CASES = [
    *MIXED,
    *NARROW,
    GatedCase(rows=(3, 13), d=45, h=37, d_out=33, dtype=torch.bfloat16, save="lean", form="gate_last"),
    GatedCase(rows=(3, 3), d=45, h=37, d_out=33),
    GatedCase(rows=(9,), d=40, h=40, d_out=24, dtype=torch.bfloat16),  # rows on 16 bytes, not 16 elements
    GatedCase(rows=(1,), d=1, h=1, d_out=1, form="gate_first"),
    GatedCase(layout="channels_first", rows=(2, 9), save="lean"),
    GatedCase(layout="expanded", rows=(2, 9), form="gate_first", dtype=torch.bfloat16),
    GatedCase(rows=(9,), biases=(True, False, False), save="lean"),
    GatedCase(rows=(9,), biases=(False, True, True), dtype=torch.bfloat16),
    GatedCase(rows=(9,), biases=(False, False, False), form="gate_first"),
    GatedCase(rows=(9,), scale=1e4, dtype=torch.bfloat16),
    GatedCase(rows=(9,), scale=1e4, form="gate_first", save="lean"),
    GatedCase(rows=(9,), scale=10.0, activation="gelu_tanh", form="gate_first"),
]
