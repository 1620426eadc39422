"""How far a model's predictions are from others that it shall learn."""

import torch.nn.functional as F
from torch import Tensor


def softened_divergence(own: Tensor, taught: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of softened predictions, times the temperature's square: (b, classes) each -> (b,)."""
    student, teacher = ((logits / temperature).log_softmax(1) for logits in (own, taught))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2
