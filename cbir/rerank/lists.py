"""What every fusion shares: the lists that several channels found for one query, side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cbir.types import Hits, Int64s

__all__ = ["Doubles", "RankedList", "fuse_lists"]

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankedList:
    """What one channel found for one query, best first: positions (R,) among all images that any channel found, and
    scores (R,) in double precision; R may be 0. `exhausted` if it would have been given more, but had no more."""

    positions: Int64s
    scores: Doubles
    exhausted: bool

    def spread(self, values: Doubles, number: int, missing: float) -> Doubles:
        """A value (R,) for each of the list's images among the `number` of all, and `missing` for the others."""
        own = np.full(number, missing)
        own[self.positions] = values
        return own


def fuse_lists(
    hits: Mapping[str, Hits], depth: int, combine: Callable[[Mapping[str, RankedList], int], Doubles]
) -> Hits:
    """The best `depth` of all images in any list, query by query.

    `combine` gets the lists by channel, in an order that does not depend on that of `hits`, and the number of images in
    them; it returns their scores. ValueError if the channels answer different queries, or if there is none.
    """
    if len({len(part) for part in hits.values()}) != 1:
        raise ValueError("fuse needs hits of one or more channels, for the same queries in each")
    rows = [_fused(hits, query, depth, combine) for query in range(len(next(iter(hits.values()))))]
    if not rows:
        return Hits(np.empty((0, depth), np.int64), np.empty((0, depth), np.float32))
    return Hits(np.concatenate([row.image_ids for row in rows]), np.concatenate([row.scores for row in rows]))


def _fused(
    hits: Mapping[str, Hits], query: int, depth: int, combine: Callable[[Mapping[str, RankedList], int], Doubles]
) -> Hits:
    ids = {name: hits[name].image_ids[query] for name in sorted(hits)}
    found = np.unique(np.concatenate([row[row >= 0] for row in ids.values()]))
    lists = {
        name: RankedList(
            np.searchsorted(found, row[row >= 0]),
            hits[name].scores[query, row >= 0].astype(np.float64),
            exhausted=bool((row < 0).any()),
        )
        for name, row in ids.items()
    }
    return Hits.ranked(found[None], combine(lists, len(found))[None].astype(np.float32), depth)
