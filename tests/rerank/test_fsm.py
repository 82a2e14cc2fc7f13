"""Fast spatial matching on planted transforms."""

from typing import Any

import numpy as np
import pytest

from cbir.rerank.fits import plausible
from cbir.rerank.fsm import Fsm, FsmFit
from cbir.rerank.matches import Matches
from cbir.types import FeatureBatch
from tests.rerank.scenes import AFFINE, NUM_FEATURES, SIMILARITY, hits, image, mapped, moved, planted, stored

SLANTED = np.array([[0.9, -0.1, 10.0], [0.2, 1.3, -50.0], [0, 0, 1]])


def spec(**fields: Any) -> Fsm:
    return Fsm(**{"channel": "local", "threshold_px": 3, **fields})


@pytest.mark.parametrize("matches", ["word", "ratio", "mutual"])
@pytest.mark.parametrize("transform", [AFFINE, SIMILARITY, SLANTED], ids=["affine", "similarity", "slanted"])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_inliers_are_the_planted_matches(transform, share, matches):
    num_true = int(share * NUM_FEATURES)
    for seed in range(5):
        query, database = planted(num_true, transform, seed)
        points = spec(matches=matches).build().matches(query, database)
        assert points.shape == (num_true, 4)
        assert points.dtype == np.float32
        np.testing.assert_array_equal(
            np.unique(points[:, :2], axis=0), np.unique(query.geometry[:num_true, :2], axis=0)
        )


def fit_of(query: FeatureBatch, database: FeatureBatch, **fields: Any) -> np.ndarray:
    matches = spec(**fields).matcher()(query, database, np.zeros(1, np.int64))
    return FsmFit(spec(**fields))(query, database, matches).transforms[0]


@pytest.mark.parametrize("transform", [AFFINE, SIMILARITY, SLANTED], ids=["affine", "similarity", "slanted"])
def test_the_transform_is_found_to_a_pixel(transform):
    found = fit_of(*planted(NUM_FEATURES // 2, transform))
    corners = np.array([[0, 0], [600, 0], [600, 600], [0, 600]], float)
    assert np.abs(mapped(found, corners) - mapped(transform, corners)).max() < 1


def test_a_similarity_is_found_where_one_is_wanted():
    found = fit_of(*planted(NUM_FEATURES // 2, SIMILARITY), model="similarity")
    assert found[0, 0] == found[1, 1]
    assert found[0, 1] == -found[1, 0]
    assert np.abs(found - SIMILARITY).max() < 0.5


@pytest.mark.parametrize("dof", [3, 4, 5])
def test_upright_features(dof):
    """Angles are 0 everywhere, and the transform hardly turns."""
    upright = np.array([[1.2, -0.03, 40.0], [0.04, 1.1, -20.0], [0, 0, 1]])
    points = spec(dof=dof).build().matches(*planted(30, upright, upright=True))
    assert len(points) == 30


def test_without_angles_turned_features_do_not_match():
    query, database = planted(60, np.array([[0.0, -1, 600], [1, 0, 0], [0, 0, 1]]))
    assert len(spec(dof=4).build().matches(query, database)) == 60
    assert len(spec(dof=3).build().matches(query, database)) < 30


def test_elliptic_shapes_determine_an_affine_transform_alone():
    """Four matches of a strong affine transform: the hypothesis of one is right for the others at once."""
    strong = np.array([[1.0, 0.9, 30.0], [0.0, 0.5, 10.0], [0, 0, 1]])
    here = np.array([[x, y, 10, 0, 1, 0] for x, y in ((100, 100), (500, 140), (180, 480), (420, 390))], np.float32)
    # A circle becomes the ellipse of A A^T; its vertical becomes that of A.
    values, vectors = np.linalg.eigh(strong[:2, :2] @ strong[:2, :2].T)
    minor, major = np.sqrt(values)
    down = strong[:2, :2] @ [0, 1]
    there = np.zeros((4, 6))
    there[:, :2] = mapped(strong, here[:, :2].astype(float))
    there[:, 2], there[:, 4] = 10 * np.sqrt(minor * major), minor / major
    there[:, 3] = np.degrees(np.arctan2(-down[0], down[1]))
    there[:, 5] = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
    words = np.arange(4, dtype=np.int32)
    pair = [image(geometry, np.zeros((4, 8), np.uint8), words) for geometry in (here, there)]
    narrow = {"min_inliers": 4, "slack": 0, "threshold_px": 1}
    assert len(spec(dof=5, **narrow).build().matches(*pair)) == 4
    assert len(spec(dof=4, **narrow).build().matches(*pair)) == 0


def test_errors_of_size_and_angle_are_forgiven():
    """20 % in size and 8 degrees, of one standard deviation: a hypothesis alone is far off at the other end."""
    for seed in range(10):
        query, database = planted(24, seed=seed)
        rng, geometry = np.random.default_rng(seed), database.geometry.copy()
        geometry[:, 2] *= np.exp(rng.normal(0, 0.2, NUM_FEATURES))
        geometry[:, 3] += rng.normal(0, 8, NUM_FEATURES)
        points = spec().build().matches(query, image(geometry, database.descriptors, database.words))
        assert len(points) == 24


def test_chance_matches_are_not_verified():
    verified = [len(spec(threshold_px=8).build().matches(*planted(0, seed=seed))) for seed in range(40)]
    assert sum(number > 0 for number in verified) <= 2


@pytest.mark.parametrize(
    "transform",
    [
        np.array([[-1.0, 0, 600], [0, 1, 0], [0, 0, 1]]),
        np.array([[0.01, 0, 300], [0, 0.01, 300], [0, 0, 1]]),
        np.array([[15.0, 0, 0], [0, 15, 0], [0, 0, 1]]),
        np.array([[1.0, 0, 0], [0, 0.15, 0], [0, 0, 1]]),
    ],
    ids=["mirror", "collapse", "zoom", "slant"],
)
def test_what_no_camera_can_cause_is_not_verified(transform):
    assert len(spec().build().matches(*planted(NUM_FEATURES, transform))) < NUM_FEATURES / 4


def test_plausible_knows_the_singular_values():
    rng = np.random.default_rng(0)
    for _ in range(300):
        linear = rng.normal(size=(2, 2)) * rng.choice([0.2, 1, 8])
        largest, smallest = np.linalg.svd(linear, compute_uv=False)
        expected = np.linalg.det(linear) > 0 and largest <= 10 and smallest >= 0.1 and largest <= 4 * smallest
        assert plausible(*linear.ravel()) == expected
    assert not plausible(np.nan, 0.0, 0.0, 1.0)


def test_the_order_of_matches_does_not_matter():
    query, database = planted(40)
    matches = spec().matcher()(query, database, np.zeros(1, np.int64))
    order = np.random.default_rng(0).permutation(len(matches.query))
    shuffled = Matches(matches.images, matches.offsets, matches.query[order], matches.database[order])
    one, two = (FsmFit(spec())(query, database, each) for each in (matches, shuffled))
    np.testing.assert_array_equal(one.inliers[order], two.inliers)
    np.testing.assert_allclose(one.transforms, two.transforms, rtol=1e-9, atol=1e-9)


def test_matches_on_one_line_determine_a_similarity():
    """A row of text: an affine transform is not determined, the verification does not fail."""
    here = np.column_stack([np.linspace(0, 500, 40), np.full(40, 70.0), np.full(40, 9.0), np.full(40, 30.0)])
    words = np.arange(40, dtype=np.int32)
    pair = [image(geometry, np.zeros((40, 8), np.uint8), words) for geometry in (here, moved(here, SIMILARITY))]
    assert len(spec().build().matches(*pair)) == 40


@pytest.mark.parametrize("num", [0, 1, 2])
def test_matches_at_one_place_determine_nothing(num):
    here = np.tile(np.array([[50.0, 60.0, 9.0, 0.0]]), (num * 20, 1))
    here[:, 3] = np.arange(num * 20)
    words = np.arange(num * 20, dtype=np.int32)
    one = image(here, np.zeros((num * 20, 8), np.uint8), words)
    assert len(spec().build().matches(one, one)) == 0


@pytest.mark.parametrize(("score", "expected"), [("ratio", 250), ("coverage", 1000)])
def test_scores_of_the_same_picture(score, expected):
    """A picture against itself with every fourth word kept: a quarter of the features match, over all of the query."""
    query, _ = planted(0)
    assert query.words is not None
    corners = np.argsort(np.abs(query.geometry[:, :2] - 300).min(1))
    kept = np.zeros(NUM_FEATURES, np.bool_)
    kept[[query.geometry[:, 0].argmin(), query.geometry[:, 0].argmax()]] = True
    kept[[query.geometry[:, 1].argmin(), query.geometry[:, 1].argmax()]] = True
    kept[corners[~kept[corners]][: 30 - kept.sum()]] = True
    words = np.where(kept, query.words, 1000 + query.words).astype(np.int32)
    other = image(query.geometry, query.descriptors, words)
    context = stored({})
    found = spec(score=score).build().rerank(hits([0]), type(context)(query, other))
    value = int(np.floor(found.scores[0, 0]))
    if score == "ratio":
        assert value == expected
    else:
        assert 400 < value < expected


def test_the_ratio_counts_only_what_both_pictures_show():
    """The database image is a corner of the query: the query's other features do not count against it."""
    query, _ = planted(0)
    assert query.words is not None
    corner = (query.geometry[:, :2] < 300).all(1)
    part = image(query.geometry[corner], query.descriptors[corner], query.words[corner])
    found = spec(score="ratio").build().rerank(hits([0]), type(stored({}))(query, part))
    assert found.scores[0, 0] >= 1000
    found = spec(score="coverage").build().rerank(hits([0]), type(stored({}))(query, part))
    assert found.scores[0, 0] < 300
