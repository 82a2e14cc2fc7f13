"""The inverted file of additive codes against its formula, plain faiss, and product codes."""

from typing import Any

import faiss
import numpy as np
import pytest
from pydantic import ValidationError

from cbir.errors import DataError
from cbir.index.additive import AdditiveEncoder
from cbir.index.ivfaq import IvfAq
from cbir.index.nearest import nearest_centroid
from tests.index.vectors import one_each, scores_by_image, words_of

LISTS = 8
KINDS = ["residual", "local_search", "product_residual"]


def small(**fields: Any) -> IvfAq:
    return IvfAq(**{"lists": LISTS, "probes": LISTS, "bytes": 6, "bits": 4, "iterations": 5, **fields})


@pytest.fixture(scope="module")
def sample():
    return one_each(800, 1)


@pytest.fixture(scope="module")
def base():
    return one_each(300, 2)


@pytest.fixture(scope="module")
def queries():
    return one_each(30, 3)


def whole_words(codebooks: np.ndarray) -> np.ndarray:
    """Codebooks (S, M / S, W, D / S) -> (M, W, D)."""
    splits, _, words, width = codebooks.shape
    parts = [
        np.pad(part, ((0, 0), (0, 0), (at * width, (splits - 1 - at) * width))) for at, part in enumerate(codebooks)
    ]
    return np.concatenate(parts).reshape(-1, words, splits * width)


def decoded(index, entries, bits: int) -> np.ndarray:
    """What entries say: centroid and the sum of the words."""
    state, lists = index.state(), entries["list"].to_numpy()
    books = whole_words(state["codebooks"])
    words = words_of(entries, len(books), bits)
    return state["centroids"][lists] + sum(book[words[:, number]] for number, book in enumerate(books))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_the_sum_of_words(kind, metric, sample, base, queries):
    """Babenko and Lempitsky 2014: by inner products with the words, and the norm for distances."""
    index = small(quantiser=kind, metric=metric).train(sample, 3)
    entries = index.entries(base)
    stored = decoded(index, entries, 4)
    assert ((stored - base.descriptors) ** 2).sum(1).mean() < 0.5 * (base.descriptors.var(0)).sum()
    hits = index.build(entries).search(queries, 300)
    rows, stored = queries.descriptors, stored[np.argsort(base.image_ids)]
    scores = rows @ stored.T if metric == "ip" else -((rows[:, None] - stored) ** 2).sum(2)
    np.testing.assert_allclose(scores_by_image(hits), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_err_no_more_than_those_of_faiss(kind, sample, base, tmp_path):
    index = small(quantiser=kind).train(sample, 3)
    entries = index.entries(base)
    lists, rows = entries["list"].to_numpy().astype(np.int64), base.descriptors
    ivf = index.empty.faiss
    codes = np.empty((300, ivf.code_size), np.uint8)
    ivf.encode_vectors(300, faiss.swig_ptr(rows), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
    theirs = np.empty((300, 32), np.float32)
    ivf.aq.decode_c(faiss.swig_ptr(codes), faiss.swig_ptr(theirs), 300)
    theirs += index.state()["centroids"][lists]
    errors = [((each - rows) ** 2).sum(1).mean() for each in (decoded(index, entries, 4), theirs)]
    assert errors[0] < 1.1 * errors[1]


def test_no_exchange_of_a_word_brings_the_sum_nearer():
    rng = np.random.default_rng(0)
    books = rng.normal(size=(4, 8, 10)).astype(np.float32)
    rows = rng.normal(size=(200, 10)).astype(np.float32) * 2
    words = AdditiveEncoder(books).words(rows)

    def errors(chosen: np.ndarray) -> np.ndarray:
        return ((rows - sum(book[chosen[:, number]] for number, book in enumerate(books))) ** 2).sum(1)

    for book in range(4):
        for word in range(8):
            other = words.copy()
            other[:, book] = word
            assert (errors(other) > errors(words) - 1e-4).all()


def test_with_words_of_separate_parts_it_is_a_product_quantiser():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(4, 16, 5)).astype(np.float32)
    rows = rng.normal(size=(500, 20)).astype(np.float32)
    words = AdditiveEncoder(whole_words(parts[:, None])).words(rows)
    expected = [nearest_centroid(rows[:, 5 * at : 5 * at + 5], book, "l2") for at, book in enumerate(parts)]
    np.testing.assert_array_equal(words, np.stack(expected, axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_codebook(kind, sample):
    books = [small(quantiser=kind, lists=1).train(sample, seed).state()["codebooks"] for seed in (1, 2)]
    assert not np.array_equal(*books)


def test_settings_that_cannot_work_are_refused(sample):
    with pytest.raises(ValidationError, match="splits are the parts of quantiser: product_residual"):
        small(splits=2)
    with pytest.raises(ValidationError, match="splits: 4 parts do not divide bytes: 6"):
        small(quantiser="product_residual", splits=4)
    with pytest.raises(DataError, match=r"splits: 3 parts do not divide vectors of D = 32"):
        small(quantiser="product_residual", splits=3).train(sample, 0)
    with pytest.raises(DataError, match=r"bits: 8 bits need a sample of at least 256 vectors, found 100"):
        small(bits=8).train(one_each(100, 1), 0)
