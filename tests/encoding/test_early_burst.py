import numpy as np

from cbir.encoding.early_burst import EarlyBurst
from cbir.index.inverted.asmk import Asmk
from cbir.index.inverted.bow import Bow
from cbir.types import FeatureBatch

RNG = np.random.default_rng(0)
ROWS = np.abs(RNG.normal(size=(6, 32))).astype(np.float32)


def images(*rows: np.ndarray) -> FeatureBatch:
    geometry = [np.arange(4 * len(some), dtype=np.float32).reshape(-1, 4) for some in rows]
    return FeatureBatch.of_images(np.arange(len(rows)), list(rows), geometry)


def encoded(batch: FeatureBatch, similarity: float = 0.97) -> FeatureBatch:
    return EarlyBurst(similarity=similarity).fit(batch, 0).encode(batch)


def test_copies_become_one_at_the_place_of_the_strongest():
    found = encoded(images(np.repeat(ROWS, [1, 4, 1, 1, 1, 1], axis=0), ROWS))
    assert found.counts.tolist() == [6, 6]
    np.testing.assert_allclose(found.descriptors[:6], ROWS, rtol=1e-6)
    np.testing.assert_array_equal(found.geometry[:3, 0], [0, 4, 20])


def test_what_is_unlike_keeps_its_bytes():
    batch = images(ROWS)
    assert encoded(batch, 1.0).descriptors.tobytes() == ROWS.tobytes()


def test_a_cluster_is_the_mean_direction_at_the_length_of_its_first():
    near = ROWS[0] + 0.05 * np.abs(RNG.normal(size=32)).astype(np.float32)
    (found,) = encoded(images(np.stack([ROWS[0], 3 * near])), 0.9).descriptors
    units = [row / np.linalg.norm(row) for row in (ROWS[0], near)]
    mean = np.sum(units, axis=0)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean) * np.linalg.norm(ROWS[0]), rtol=1e-5)


def test_many_copies_of_a_patch_score_as_one():
    burst = images(np.repeat(ROWS, [9, 1, 1, 1, 1, 1], axis=0), ROWS, ROWS[::-1].copy())
    once = encoded(burst)
    for spec in (Bow(words=6, idf=False), Asmk(words=6, query_assignments=1)):
        index = spec.train(once.take(np.array([1])), 0)
        hits = index.build(index.entries(once)).search(index.queries(once.take(np.array([1]))), 3)
        np.testing.assert_allclose(hits.scores, 1.0, rtol=1e-5)
