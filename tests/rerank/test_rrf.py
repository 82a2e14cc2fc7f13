"""Reciprocal rank fusion on a table that can be followed by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from cbir.rerank.rrf import Rrf
from cbir.types import Hits


def hits(*ids: int, scale: float = 1.0) -> Hits:
    """These images in this order."""
    return Hits.ranked(np.array([ids], np.int64), scale * np.arange(len(ids), 0, -1, dtype=np.float32)[None], len(ids))


def fused(spec: Rrf, *channels: Hits) -> dict[int, float]:
    found = spec.build().fuse({str(number): part for number, part in enumerate(channels)}, 6)
    kept = found.image_ids[0] >= 0
    return dict(zip(found.image_ids[0, kept].tolist(), found.scores[0, kept].tolist(), strict=True))


def test_ranks_are_summed_from_one_with_sixty_added():
    table = fused(Rrf(), hits(1, 2, 3), hits(3, 4, 2))
    assert list(table) == [3, 2, 1, 4]
    expected = {3: 1 / 63 + 1 / 61, 2: 1 / 62 + 1 / 63, 1: 1 / 61, 4: 1 / 62}
    assert table == pytest.approx(expected, rel=1e-6)


def test_a_small_k_trusts_the_first_ranks():
    assert next(iter(fused(Rrf(k=60), hits(1, 2, 3, 4), hits(5, 2, 3, 4)))) == 2
    assert next(iter(fused(Rrf(k=0), hits(1, 2, 3, 4), hits(5, 2, 3, 4)))) in {1, 2}
    assert fused(Rrf(k=0), hits(1, 2, 3, 4), hits(5, 2, 3, 4))[1] == 1.0


def test_scores_do_not_matter():
    assert fused(Rrf(), hits(1, 2), hits(3, 1)) == fused(Rrf(), hits(1, 2, scale=1e6), hits(3, 1, scale=1e-6))


def test_refuses_a_negative_k_and_different_queries():
    with pytest.raises(ValidationError):
        Rrf(k=-1)
    two = Hits(np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="same queries"):
        Rrf().build().fuse({"a": hits(1), "b": two}, 3)
