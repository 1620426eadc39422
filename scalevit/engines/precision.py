"""Mixed precision: number formats, the loss scale of fp16, products of fp32 matrices. Must not know engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from scalevit.config.base import MatmulPrecision, Precision

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bf16-weights": torch.bfloat16,
}
"""Of the computation."""


def weight_dtype(precision: Precision) -> torch.dtype:
    """Of the weights, and so of the optimizer's state."""
    return torch.bfloat16 if precision == "bf16-weights" else torch.float32


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2), with torch.amp.GradScaler's numbers."""

    value: float = 1.0
    grown_steps: int = 0
    enabled: bool = False

    @classmethod
    def for_precision(cls, precision: Precision) -> "LossScale":
        """Enabled for fp16, else constantly 1."""
        return cls(value=2.0**16, enabled=True) if precision == "fp16" else cls()

    def update(self, overflow: bool, growth_interval: int = 2000) -> None:
        """After a step: halves the scale if the gradient overflowed, doubles it after an interval without overflow."""
        if not self.enabled:
            return
        if overflow:
            self.value, self.grown_steps = max(self.value / 2, 1.0), 0
        else:
            self.grown_steps += 1
            if self.grown_steps == growth_interval:
                self.value, self.grown_steps = self.value * 2, 0


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """For the block, products of fp32 matrices in the whole process have this precision (`train.matmul_precision`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
