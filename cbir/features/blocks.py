"""Descriptors side by side: of several layers, or of several networks."""

from collections.abc import Sequence

import numpy as np

from cbir.types import Floats

__all__ = ["one_weight_each", "side_by_side"]


def one_weight_each(weights: Sequence[float], num: int, what: str) -> None:
    """ValueError unless there are no weights, or as many as `what`."""
    if weights and len(weights) != num:
        raise ValueError(f"{len(weights)} weights for {num} {what}: give one for each, or none for equal ones")


def side_by_side(blocks: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Blocks (..., D_m) of unit vectors, each times its weight -> unit vectors (..., sum of D_m).

    The inner product of two such vectors is the mean of the blocks' cosines, weighted by the squares of the weights.
    Without weights, all are equal.
    """
    given = np.array(weights or [1.0] * len(blocks))
    unit = (given / np.linalg.norm(given)).astype(np.float32)
    joined: Floats = np.concatenate([weight * block for weight, block in zip(unit, blocks, strict=True)], axis=-1)
    return joined
