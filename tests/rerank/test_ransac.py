"""Geometric verification by random samples, on planted transforms and on photographs of DVD covers."""

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cbir.rerank.ransac import Ransac, RansacFit
from cbir.types import FeatureBatch, Hits
from tests.rerank.scenes import AFFINE, HOMOGRAPHY, NUM_FEATURES, Stored, hits, mapped, planted, stored


def spec(**fields: Any) -> Ransac:
    return Ransac(channel="local", **fields)


@pytest.mark.parametrize("method", ["usac_fast", "magsac"])
@pytest.mark.parametrize(("model", "transform"), [("affine", AFFINE), ("homography", HOMOGRAPHY)])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_inliers_are_the_planted_matches(model, transform, method, share):
    num_true = int(share * NUM_FEATURES)
    for seed in range(5):
        query, database = planted(num_true, transform, seed)
        reranker = spec(model=model, method=method, threshold_px=3).build()
        points = reranker.matches(query, database)
        assert points.shape == (num_true, 4)
        assert points.dtype == np.float32
        np.testing.assert_array_equal(
            np.unique(points[:, :2], axis=0), np.unique(query.geometry[:num_true, :2], axis=0)
        )
        assert np.abs(mapped(transform, points[:, :2]) - points[:, 2:]).max() < 1


@pytest.mark.parametrize(("model", "transform"), [("affine", AFFINE), ("homography", HOMOGRAPHY)])
def test_the_transform_is_found_to_a_pixel(model, transform):
    query, database = planted(NUM_FEATURES // 2, transform)
    matches = spec(model=model).matcher()(query, database, np.zeros(1, np.int64))
    points = matches.points(query, database)
    assert len(points) == NUM_FEATURES
    found = RansacFit(spec(model=model)).estimate(points)
    corners = np.array([[0, 0], [600, 0], [600, 600], [0, 600]], float)
    assert np.abs(mapped(found, corners) - mapped(transform, corners)).max() < 1
    assert RansacFit(spec(model=model)).estimate(points[:2]) is None


def test_the_same_seed_gives_the_same_matches():
    query, database = planted(10, seed=3)
    found = [spec(seed=4, threshold_px=40).build().matches(query, database) for _ in range(3)]
    assert len(found[0])
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


@pytest.mark.parametrize(
    "transform",
    [
        np.array([[-1.0, 0, 600], [0, 1, 0], [0, 0, 1]]),
        np.array([[0.01, 0, 300], [0, 0.01, 300], [0, 0, 1]]),
        np.array([[15.0, 0, 0], [0, 15, 0], [0, 0, 1]]),
        np.array([[1.0, 0, 0], [0, 0.15, 0], [0, 0, 1]]),
        np.array([[-1.0, 0, 600], [0, 1, 0], [1e-4, 0, 1]]),
    ],
    ids=["mirror", "collapse", "zoom", "slant", "mirror homography"],
)
def test_what_no_camera_can_cause_is_not_verified(transform):
    query, database = planted(NUM_FEATURES, transform)
    model = "homography" if transform[2, 0] else "affine"
    assert len(spec(model=model).build().matches(query, database)) == 0


@pytest.fixture(scope="module")
def collection() -> Stored:
    """Images 2, 5, 7 and 9 have enough true matches, 7 and 9 equally many."""
    return stored({2: 20, 4: 5, 5: 60, 7: 30, 9: 30})


def test_verified_images_come_first_by_inliers_then_by_rank(collection):
    found = spec(top=0, threshold_px=3).build().rerank(hits([0, 9, 1, 2, 7, 3, 4, 5, 6]), collection)
    assert found.image_ids.tolist() == [[5, 9, 7, 2, 0, 1, 3, 4, 6]]
    assert np.floor(found.scores).tolist() == [[60, 30, 30, 20, 0, 0, 0, 0, 0]]
    assert (np.diff(found.scores) < 0).all()


def test_images_below_top_follow_in_their_order(collection):
    found = spec(top=4, threshold_px=3).build().rerank(hits([0, 9, 1, 2, 7, 3, 4, 5, 6]), collection)
    assert found.image_ids.tolist() == [[9, 2, 0, 1, 7, 3, 4, 5, 6]]


def test_min_inliers_decides_what_is_verified(collection):
    found = spec(min_inliers=25, threshold_px=3).build().rerank(hits([0, 9, 1, 2, 7, 5]), collection)
    assert found.image_ids.tolist() == [[5, 9, 7, 0, 1, 2]]
    assert np.floor(found.scores).tolist() == [[60, 30, 30, 0, 0, 0]]


def sift(path: Path) -> tuple[np.ndarray, np.ndarray]:
    picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    keypoints, rows = cv2.SIFT.create(500).detectAndCompute(picture, None)
    points = np.array([[*point.pt, point.size, point.angle] for point in keypoints], np.float32)
    return (rows.astype(np.uint8), points) if keypoints else (np.empty((0, 128), np.uint8), points.reshape(0, 4))


def extracted(folder: Path, names: list[str]) -> FeatureBatch:
    found = [sift(folder / name) for name in names]
    return FeatureBatch.of_images(np.arange(len(names)), [rows for rows, _ in found], [points for _, points in found])


def test_finds_dvd_covers_among_others(test_data):
    """12 photographs against the references of 50 covers and 50 distractors, from a ranking without meaning."""
    folder = test_data / "photos" / "smvs_dvd"
    with (folder / "ground_truth.csv").open() as file:
        rows = list(csv.DictReader(file))
    references = [row for row in rows if row["role"] == "database"][:50]
    known = {row["instance_id"]: number for number, row in enumerate(references)}
    asked = [row for row in rows if row["role"] == "query" and row["instance_id"] in known][::16][:12]
    others = sorted((test_data / "photos" / "distractors" / "images").iterdir())[:50]
    database = extracted(folder, [row["image"] for row in references] + [str(path) for path in others])
    queries = extracted(folder, [row["image"] for row in asked])
    order = np.stack([np.random.default_rng(seed).permutation(100) for seed in range(len(asked))])
    ranking = Hits(order, np.broadcast_to(np.linspace(1, 0, 100, dtype=np.float32), order.shape).copy())
    found = spec().build().rerank(ranking, Stored(queries, database))
    right = sum(found.image_ids[number, 0] == known[row["instance_id"]] for number, row in enumerate(asked))
    assert right >= 11
