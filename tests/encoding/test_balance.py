import numpy as np
import pytest
from pydantic import ValidationError

from cbir.encoding.balance import Balance, balancing_reflection, random_rotation
from cbir.encoding.pca import Pca
from cbir.errors import DataError
from cbir.index.ivfpq import IvfPq
from cbir.types import FeatureBatch

DIM, PARTS = 32, 8
FORMS = [Balance(form="householder", parts=PARTS), Balance(form="rotation")]


def batch(rows):
    return FeatureBatch.of_global(np.arange(len(rows)), rows)


def encode(spec, rows, trained_on=None):
    return spec.fit(batch(rows if trained_on is None else trained_on), 3).encode(batch(rows)).descriptors


def components(num_rows=2000, seed=0):
    """What PCA makes of correlated rows: uncorrelated components of falling variance."""
    rng = np.random.default_rng(seed)
    mixed = np.linalg.qr(np.random.default_rng(99).normal(size=(DIM, DIM)))[0] / np.arange(1, DIM + 1)[:, None] ** 0.7
    rows = (rng.normal(size=(num_rows, DIM)) @ mixed).astype(np.float32)
    return encode(Pca(dim=DIM, l2=False), rows)


def ratio(rows):
    """The largest variance of a sub-vector over the smallest."""
    variances = rows.astype(np.float64).var(axis=0).reshape(PARTS, -1).sum(axis=1)
    return variances.max() / variances.min()


@pytest.fixture(params=FORMS, ids=lambda spec: spec.form)
def spec(request):
    return request.param


def test_the_transform_is_orthogonal(spec):
    matrix = encode(spec, np.eye(DIM, dtype=np.float32), trained_on=components()).T.astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(DIM), atol=1e-6)


def test_a_reflection_is_its_own_inverse_and_a_rotation_is_not():
    rows = components()
    for spec, is_involution in zip(FORMS, (True, False), strict=True):
        encoder = spec.fit(batch(rows), 0)
        twice = encoder.encode(encoder.encode(batch(rows))).descriptors
        assert np.allclose(twice, rows, atol=1e-6) == is_involution


def test_distances_are_kept(spec):
    rows = components(100)
    turned = encode(spec, rows, trained_on=components())
    np.testing.assert_allclose(turned @ turned.T, rows @ rows.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-6)


def test_variances_of_sub_vectors_become_more_alike(spec):
    known, unseen = components(), components(seed=1)
    assert ratio(unseen) > 10
    assert ratio(encode(spec, unseen, trained_on=known)) < ratio(unseen) / 2


def test_a_reflection_spreads_one_dominant_direction_evenly():
    rows = components(4000)
    rows[:, 1:] *= 1e-3
    covariance = np.cov(rows.T.astype(np.float64))
    assert ratio(rows) > 1e4
    assert ratio(encode(FORMS[0], rows)) < 1.01
    normal = balancing_reflection(covariance, PARTS)
    assert np.linalg.norm(normal) == pytest.approx(1, abs=1e-12)


def test_the_poorest_sub_vectors_get_the_most():
    gains = np.diff([np.diag(moved).reshape(PARTS, -1).sum(axis=1) for moved in reflected()], axis=0)[0]
    assert gains[0] < 0
    assert (np.diff(gains[1:]) > 0).all()


def reflected():
    """A falling spectrum as a covariance, before and after."""
    covariance = np.diag(1.0 / np.arange(1, DIM + 1))
    normal = balancing_reflection(covariance, PARTS)
    matrix = np.eye(DIM) - 2 * np.outer(normal, normal)
    return covariance, matrix @ covariance @ matrix


def test_the_bytes_of_a_row_depend_on_this_row_alone(spec):
    encoder, rows = spec.fit(batch(components()), 0), components(1500, 2)
    whole = encoder.encode(batch(rows)).descriptors
    parts = [encoder.encode(batch(some)).descriptors for some in np.split(rows, [1, 700, 1027])]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_another_seed_is_another_rotation_and_the_determinant_is_one_or_minus_one():
    one, same, other = (random_rotation(DIM, seed) for seed in (0, 0, 1))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert abs(np.linalg.det(one)) == pytest.approx(1)


def test_product_codes_of_sorted_components_find_more(spec):
    rows, queries = components(3000), components(100, 5)
    exact = np.argsort(((queries[:, None] - rows) ** 2).sum(axis=2), axis=1)[:, :10]
    found = recall(rows, queries, exact)
    encoder = spec.fit(batch(rows), 0)
    balanced = recall(encoder.encode(batch(rows)).descriptors, encoder.encode(batch(queries)).descriptors, exact)
    assert balanced > found


def recall(rows, queries, exact):
    """Recall@10 of product codes with one list."""
    index = IvfPq(lists=1, bytes=PARTS, bits=4, metric="l2", iterations=8).train(batch(rows), 0)
    hits = index.build(index.entries(batch(rows))).search(batch(queries), 10).image_ids
    return np.mean([len(set(one) & set(other)) / 10 for one, other in zip(hits, exact, strict=True)])


def test_bad_settings_and_samples_are_refused_with_a_remedy():
    with pytest.raises(ValidationError, match="parts: form householder needs parts; set it to the bytes of ivfpq"):
        Balance(form="householder")
    with pytest.raises(ValidationError, match="parts: form rotation knows no parts; leave it out"):
        Balance(parts=4)
    with pytest.raises(DataError, match="parts: 5 parts do not divide vectors of D = 32; set a divisor"):
        Balance(form="householder", parts=5).fit(batch(components()), 0)
    with pytest.raises(DataError, match="all rows of the sample are equal"):
        FORMS[0].fit(batch(np.ones((20, DIM), np.float32)), 0)
    with pytest.raises(DataError, match="NaN or infinite"):
        FORMS[0].fit(batch(np.full((20, DIM), np.nan, np.float32)), 0)
    for spec in FORMS:
        with pytest.raises(DataError, match="at least two rows is needed, found 1"):
            spec.fit(batch(components()[:1]), 0)
