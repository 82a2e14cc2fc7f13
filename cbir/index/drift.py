"""How well trained lists or words suit features that they were not trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cbir.index.index import Assignment

__all__ = ["Fit", "fit_of"]

_SHARES = np.linspace(0, 1, 11)


@dataclass(frozen=True)
class Fit:
    """How some rows fall among trained lists or words, in figures that do not grow with their number.

    `error`: the mean squared distance to the centroid (quantisation error), `errors` its quantiles from 0 to 1 in
    tenths. `imbalance`: how much longer a search is than if all lists were of one length, the imbalance factor
    L sum p_i^2 of Jégou et al. 2010, without the bias of a sample. `entropy`: that of the assignment over log L, from 0
    to 1, corrected after Miller (1955).
    """

    rows: int
    error: float
    errors: Sequence[float]
    imbalance: float
    entropy: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Fit":
        """Back from `to_json`."""
        return cls(**record)


def fit_of(assignment: Assignment) -> Fit:
    """The figures of at least two rows."""
    counts = np.bincount(assignment.lists)
    counts, rows = counts[counts > 0].astype(np.float64), len(assignment.lists)
    shares = counts / rows
    entropy = float(-(shares * np.log(shares)).sum()) + (len(counts) - 1) / (2 * rows)
    pairs = float((counts * (counts - 1)).sum()) / (rows * (rows - 1))
    return Fit(
        rows=rows,
        error=float(assignment.errors.mean()),
        errors=[float(error) for error in np.quantile(assignment.errors, _SHARES)],
        imbalance=assignment.num_lists * pairs,
        entropy=min(1.0, entropy / math.log(max(assignment.num_lists, 2))),
    )
