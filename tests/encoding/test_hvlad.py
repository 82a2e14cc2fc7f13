import numpy as np
import pytest

from cbir.encoding.hvlad import HierarchicalVlad
from cbir.encoding.vlad import Vlad, normalised_vlad
from cbir.types import FeatureBatch

WORDS, CHILDREN, DIM = 4, 3, 8


@pytest.fixture(scope="module")
def sample():
    return batch(0, [150, 250])


def batch(seed, counts):
    rng = np.random.default_rng(seed)
    return FeatureBatch.of_images(
        np.arange(len(counts)), [rng.normal(size=(count, DIM)).astype(np.float32) for count in counts]
    )


def test_one_child_per_word_is_vlad(sample):
    one = HierarchicalVlad(words=WORDS, children=1).fit(sample, 3)
    plain = Vlad(words=WORDS).fit(sample, 3)
    np.testing.assert_allclose(one.encode(sample).descriptors, plain.encode(sample).descriptors, atol=1e-6)


def test_the_definition_written_as_loops(sample):
    encoder = HierarchicalVlad(words=WORDS, children=CHILDREN, alpha=1.0, intra=False).fit(sample, 3)
    centroids, leaves = encoder.state()["centroids"], encoder.state()["leaves"]
    image = batch(1, [40])
    sums = np.zeros((WORDS, CHILDREN, DIM))
    for x in image.descriptors:
        word = ((x - centroids) ** 2).sum(axis=1).argmin()
        child = ((x - leaves[word]) ** 2).sum(axis=1).argmin()
        sums[word, child] += x - leaves[word, child]
    expected = normalised_vlad(sums.reshape(-1, DIM), 1.0, False)
    np.testing.assert_allclose(encoder.encode(image).descriptors[0], expected, atol=1e-6)


def test_children_are_the_means_of_their_rows(sample):
    encoder = HierarchicalVlad(words=WORDS, children=CHILDREN, iterations=100).fit(sample, 3)
    leaves = encoder.assign(sample.descriptors)
    means = [sample.descriptors[leaves == leaf].mean(axis=0) for leaf in range(WORDS * CHILDREN)]
    np.testing.assert_allclose(encoder.state()["leaves"].reshape(-1, DIM), means, atol=1e-4)


def test_a_cell_with_fewer_rows_than_children_keeps_its_word():
    few = batch(2, [6])
    encoder = HierarchicalVlad(words=WORDS, children=5).fit(few, 0)
    words = encoder.codebook.assign(few.descriptors)
    for word in np.flatnonzero(np.bincount(words, minlength=WORDS) < 5):
        np.testing.assert_array_equal(encoder.leaves[word], np.tile(encoder.codebook.centroids[word], (5, 1)))
        assert set(encoder.assign(few.descriptors[words == word]).tolist()) <= {int(word) * 5}
