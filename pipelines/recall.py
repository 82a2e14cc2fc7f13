"""How much of what exact search finds an index finds. A query that is itself indexed is no neighbour of its own."""

from collections.abc import Callable, Sequence

import numpy as np

from cbir.evaluation.metrics import ann_recall
from cbir.index.index import IndexSpec, SearchIndex
from cbir.types import FeatureBatch, Hits, Int64s, in_order

__all__ = ["Opened", "index_recalls", "others", "recalls", "recalls_by_effort"]

DEPTHS = (1, 10, 100)
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Opened = Callable[[IndexSpec], Sequence[SearchIndex]]
"""The partitions of a channel, opened with these settings of its index."""


def others(image_ids: Int64s, own: Int64s) -> Int64s:
    """The ids (Q, R - 1) but the query's own (Q,), or but the last one where that is not among them."""
    order = np.argsort(image_ids == own[:, None], axis=1, kind="stable")
    return in_order(image_ids, order)[:, :-1]


def recalls(found: Int64s, wanted: Int64s, most: int) -> dict[int, float]:
    """Recall@k of ids found (Q, R) against those wanted (Q, R'), by k up to `most` or how many are wanted."""
    most = min(most, int((wanted[:1] >= 0).sum()))
    return {k: ann_recall(found, wanted, k) for k in [k for k in DEPTHS if k <= most] or [most] if k}


def index_recalls(indexes: Sequence[SearchIndex], probes: FeatureBatch, exact: Hits) -> dict[int, float]:
    """Recall@k, by k, of the partitions of an index, given what exact search finds for these of its images."""
    depth = max(DEPTHS) + 1
    found = Hits.merge([index.search(probes, depth) for index in indexes], depth).image_ids
    return recalls(others(found, probes.image_ids), others(exact.image_ids, probes.image_ids), max(DEPTHS))


def recalls_by_effort(spec: IndexSpec, opened: Opened, probes: FeatureBatch, exact: Hits) -> dict[int, float]:
    """Recall@10 by how much of an index a search looks at: by the values of `IndexSpec.effort`, up to one that finds
    all, or no more than the two before it; empty for an index without."""
    if spec.effort is None:
        return {}
    curve: dict[int, float] = {}
    for value in sorted({*EFFORTS, getattr(spec, spec.effort)}):
        found = index_recalls(opened(spec.model_copy(update={spec.effort: value})), probes, exact)
        if 10 not in found:
            break
        curve[value] = found[10]
        if found[10] == 1.0 or list(curve.values())[-3:] == [found[10]] * 3:
            break
    return curve
