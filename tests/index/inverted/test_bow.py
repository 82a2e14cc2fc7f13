import numpy as np
import pytest

from cbir.index.inverted.bow import Bm25, Bow
from cbir.types import FeatureBatch
from tests.index.inverted.features import SEED, local_features

WORDS = 16


def histograms(index, batch: FeatureBatch) -> np.ndarray:
    words = index.vocabulary.nearest(batch.descriptors, 1)[:, 0]
    return np.array([np.bincount(words[batch.rows(i)], minlength=WORDS) for i in range(len(batch))], float)


def found_scores(index, batch, queries) -> np.ndarray:
    hits = index.build(index.entries(batch)).search(index.queries(queries), len(batch))
    scores = np.zeros((len(queries), len(batch)))
    for query, image in np.argwhere(hits.image_ids >= 0):
        scores[query, batch.image_ids.tolist().index(hits.image_ids[query, image])] = hits.scores[query, image]
    return scores


@pytest.mark.parametrize("root", [True, False])
def test_scores_are_the_cosines_of_tf_idf_histograms(root):
    index, batch, queries = (
        Bow(words=WORDS, root=root).train(local_features(60, 1), SEED),
        local_features(30, 2),
        local_features(9, 3),
    )
    counts, asked = histograms(index, batch), histograms(index, queries)
    having = (counts > 0).sum(0)
    idf = np.where(having, np.log((counts.sum(1) > 0).sum() / np.maximum(having, 1)), 1.0)
    left, right = ((np.sqrt(rows) if root else rows) * idf for rows in (asked, counts))
    lengths = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    expected = np.divide(left @ right.T, lengths, where=lengths > 0, out=np.zeros_like(lengths))
    np.testing.assert_allclose(found_scores(index, batch, queries), expected, atol=1e-6)


def test_a_word_that_all_images_have_says_nothing():
    rows = np.eye(4, 24, dtype=np.float32)
    batch = FeatureBatch.of_images(np.arange(3), [rows[[0, 1]], rows[[0, 2]], rows[[0, 3]]])
    index = Bow(words=4).train(batch, SEED)
    query = FeatureBatch.of_images(np.array([0]), [rows[[0]]])
    assert (found_scores(index, batch, query) == 0).all()


def test_bm25_is_its_formula():
    index = Bm25(words=WORDS, k1=1.6, b=0.6).train(local_features(60, 1), SEED)
    batch, queries = local_features(30, 2), local_features(9, 3)
    counts, asked = histograms(index, batch), histograms(index, queries)
    images = (counts.sum(1) > 0).sum()
    idf = np.log(images / np.maximum((counts > 0).sum(0), 1))
    relative = counts.sum(1) / (counts.sum() / images)
    saturated = counts * 2.6 / (counts + 1.6 * (0.4 + 0.6 * relative)[:, None])
    np.testing.assert_allclose(found_scores(index, batch, queries), (asked * idf) @ saturated.T, rtol=1e-5, atol=1e-6)


def test_without_k1_bm25_counts_each_word_once():
    index = Bm25(words=WORDS, k1=0.0).train(local_features(60, 1), SEED)
    batch, queries = local_features(30, 2), local_features(9, 3)
    counts, asked = histograms(index, batch), histograms(index, queries)
    idf = np.log((counts.sum(1) > 0).sum() / np.maximum((counts > 0).sum(0), 1))
    np.testing.assert_allclose(
        found_scores(index, batch, queries), (asked * idf) @ (counts > 0).T, rtol=1e-5, atol=1e-6
    )
