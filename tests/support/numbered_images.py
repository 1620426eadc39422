"""Images that show their own number, for tests of loaders."""

import torch


def sample_numbers(images: torch.Tensor) -> list[int]:
    """The number of the sample in each row (n, 3, S, S), in a set whose image n is grey of value n."""
    return images[:, 0].float().mean((1, 2)).round().long().tolist()
