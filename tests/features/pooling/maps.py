"""Feature maps for the tests of poolings."""

import torch


def maps(shape: tuple[int, ...] = (3, 5, 7, 9), seed: int = 0) -> torch.Tensor:
    """Normally distributed, half of them negative."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rectified(shape: tuple[int, ...] = (3, 5, 7, 9), seed: int = 0) -> torch.Tensor:
    """As after a ReLU, in float64: half of the values are 0."""
    return maps(shape, seed).clamp(min=0).double()
