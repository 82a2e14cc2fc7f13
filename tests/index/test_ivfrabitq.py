"""RaBitQ codes against what the paper proves of them, and against plain faiss."""

from typing import Any

import faiss
import numpy as np
import pytest
from pydantic import ValidationError

from cbir.index.codes import inverted_file
from cbir.index.ivfrabitq import IvfRabitq
from tests.index.vectors import one_each, scores_by_image

LISTS = 8


def all_probed(**fields: Any) -> IvfRabitq:
    return IvfRabitq(**{"lists": LISTS, "probes": LISTS, "iterations": 5, **fields})


@pytest.fixture(scope="module")
def sample():
    return one_each(800, 1)


@pytest.fixture(scope="module")
def base():
    return one_each(300, 2)


@pytest.fixture(scope="module")
def queries():
    return one_each(60, 3)


def errors(spec: IvfRabitq, sample, base, queries) -> np.ndarray:
    """Estimated minus true scores (Q, N)."""
    index = spec.train(sample, 3)
    hits = index.build(index.entries(base)).search(queries, 300)
    rows, vectors = queries.descriptors, base.descriptors[np.argsort(base.image_ids)]
    scores = rows @ vectors.T if spec.metric == "ip" else -((rows[:, None] - vectors) ** 2).sum(2)
    return scores_by_image(hits) - scores


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_estimates_have_no_bias_and_more_bits_err_less(metric, sample, base, queries):
    """Gao and Long 2024, theorem 3.2; the error halves with every bit (Gao et al. 2025)."""
    spread = {}
    for bits in (1, 2, 4, 8):
        off = errors(all_probed(bits=bits, metric=metric), sample, base, queries)
        spread[bits] = off.std()
        assert abs(off.mean()) < 0.1 * off.std() + 2e-3
    assert spread[1] < 0.3
    assert spread[2] < 0.7 * spread[1]
    assert spread[4] < 0.5 * spread[2]
    assert spread[8] < 0.5 * spread[4]


@pytest.mark.parametrize("bits", [1, 5])
def test_codes_are_those_of_faiss(bits, sample, base):
    index = all_probed(bits=bits).train(sample, 3)
    entries = index.entries(base)
    rows = index.quantisers.rotate(base.descriptors)
    lists = entries["list"].to_numpy().astype(np.int64)
    ivf = inverted_file(index.empty.faiss)
    codes = np.zeros((300, ivf.code_size), np.uint8)
    ivf.encode_vectors(300, faiss.swig_ptr(rows), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
    assert b"".join(entries["code"].to_pylist()) == codes.tobytes()


def test_the_rotation_is_orthogonal_and_follows_the_seed(sample):
    rotations = [all_probed().train(sample, seed).state()["rotation"] for seed in (1, 1, 2)]
    np.testing.assert_allclose(rotations[0] @ rotations[0].T, np.eye(32), atol=1e-5)
    np.testing.assert_array_equal(rotations[0], rotations[1])
    assert not np.allclose(rotations[0], rotations[2])


def test_the_file_opens_without_cbir(sample, base, queries, tmp_path):
    index = all_probed().train(sample, 3)
    partition = index.build(index.entries(base))
    partition.save(tmp_path / "part.faiss")
    plain = faiss.read_index(str(tmp_path / "part.faiss"))
    ids = plain.search(queries.descriptors, 1)[1]
    assert (ids == partition.search(queries, 1).image_ids).mean() > 0.95


def test_more_than_nine_bits_are_refused():
    with pytest.raises(ValidationError, match="bits"):
        IvfRabitq(bits=10)
