"""Geometric verification on planted transforms and on photographs of DVD covers."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cbir.rerank.ransac import Ransac, tentative_matches
from cbir.types import FeatureBatch, Hits, Int64s

AFFINE = np.array([[1.1, -0.3, 40.0], [0.25, 0.9, -20.0]])
HOMOGRAPHY = np.array([[1.1, -0.2, 30.0], [0.15, 0.9, 10.0], [2e-4, -1e-4, 1.0]])
NUM_FEATURES = 120


@dataclass(frozen=True)
class Stored:
    queries: FeatureBatch
    database: FeatureBatch

    def query_features(self, channel: str) -> FeatureBatch:
        assert channel == "local"
        return self.queries

    def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
        assert channel == "local"
        return self.database.take(image_ids)


def spec(**fields: Any) -> Ransac:
    return Ransac(channel="local", **fields)


def mapped(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    wide = np.hstack([points, np.ones((len(points), 1))]) @ transform.T
    return wide[:, :2] / wide[:, 2:] if len(transform) == 3 else wide


def sift_like(num: int, rng: np.random.Generator) -> np.ndarray:
    return rng.gamma(0.5, 30, (num, 128)).clip(0, 255).astype(np.uint8)


def image(points: np.ndarray, descriptors: np.ndarray) -> FeatureBatch:
    geometry = np.zeros((len(points), 4), np.float32)
    geometry[:, :2] = points
    return FeatureBatch(np.array([0]), np.array([0, len(points)]), descriptors, geometry)


def planted(num_true: int, transform: np.ndarray = AFFINE, seed: int = 0) -> tuple[FeatureBatch, FeatureBatch]:
    """Two images whose features match one to one; the first `num_true` by the transform, the others far from it."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 600, (NUM_FEATURES, 2))
    there = mapped(transform, points) + rng.uniform(-0.3, 0.3, points.shape)
    away = rng.uniform(60, 300, points.shape) * rng.choice([-1, 1], points.shape)
    there[num_true:] += away[num_true:]
    descriptors = sift_like(NUM_FEATURES, rng)
    order = rng.permutation(NUM_FEATURES)
    return image(points, descriptors), image(there[order], descriptors[order])


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
        np.testing.assert_array_equal(points[:, :2], query.geometry[:num_true, :2])
        assert np.abs(mapped(transform, points[:, :2]) - points[:, 2:]).max() < 1


@pytest.mark.parametrize(("model", "transform"), [("affine", AFFINE), ("homography", HOMOGRAPHY)])
def test_the_transform_is_found_to_a_pixel(model, transform):
    query, database = planted(NUM_FEATURES // 2, transform)
    rows, columns = tentative_matches(*(each.descriptors.astype(np.float32) for each in (query, database)), 0.8, True)
    points = np.hstack([query.geometry[rows, :2], database.geometry[columns, :2]])
    assert len(points) == NUM_FEATURES
    found = spec(model=model).build().estimate(points)
    corners = np.array([[0, 0], [600, 0], [600, 600], [0, 600]], float)
    assert np.abs(mapped(found, corners) - mapped(transform, corners)).max() < 1
    assert spec(model=model).build().estimate(points[:2]) is None


def test_the_same_seed_gives_the_same_matches():
    query, database = planted(10, seed=3)
    found = [spec(seed=4, threshold_px=40).build().matches(query, database) for _ in range(3)]
    assert len(found[0])
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


@pytest.mark.parametrize(
    "transform",
    [
        np.array([[-1.0, 0, 600], [0, 1, 0]]),
        np.array([[0.01, 0, 300], [0, 0.01, 300]]),
        np.array([[15.0, 0, 0], [0, 15, 0]]),
        np.array([[1.0, 0, 0], [0, 0.15, 0]]),
        np.array([[-1.0, 0, 600], [0, 1, 0], [1e-4, 0, 1]]),
    ],
    ids=["mirror", "collapse", "zoom", "slant", "mirror homography"],
)
def test_what_no_camera_can_cause_is_not_verified(transform):
    query, database = planted(NUM_FEATURES, transform)
    model = "affine" if len(transform) == 2 else "homography"
    assert len(spec(model=model).build().matches(query, database)) == 0


def brute_force_matches(left: np.ndarray, right: np.ndarray, ratio: float) -> dict[int, int]:
    distances = np.sqrt(((left[:, None].astype(float) - right) ** 2).sum(2))
    best: dict[int, int] = {}
    for row in range(len(left)):
        first, second = np.argsort(distances[row])[:2]
        closer = first not in best or distances[row, first] < distances[best[first], first]
        if distances[row, first] < ratio * distances[row, second] and closer:
            best[int(first)] = row
    return {row: column for column, row in best.items()}


def test_tentative_matches_equal_brute_force():
    rng = np.random.default_rng(0)
    right = rng.normal(size=(80, 16)).astype(np.float32)
    left = (right[rng.integers(0, 80, 150)] + 0.6 * rng.normal(size=(150, 16))).astype(np.float32)
    rows, columns = tentative_matches(left, right, 0.9, one_to_one=True)
    expected = brute_force_matches(left, right, 0.9)
    assert len(expected) > 20
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    many, _ = tentative_matches(left, right, 0.9, one_to_one=False)
    assert set(rows.tolist()) < set(many.tolist())
    assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(("num_left", "num_right"), [(0, 9), (9, 0), (9, 1), (1, 9)])
def test_few_features_have_no_ratio(num_left, num_right):
    rng = np.random.default_rng(0)
    left, right = sift_like(num_left, rng).astype(np.float32), sift_like(num_right, rng).astype(np.float32)
    rows, columns = tentative_matches(left, right, 1.0, one_to_one=True)
    assert len(rows) == len(columns) == (1 if num_right > 1 and num_left else 0)


def test_repeated_descriptors_are_ambiguous():
    """A pattern that stands twice in the database image matches neither, as the ratio test wants it."""
    rows = sift_like(10, np.random.default_rng(0)).astype(np.float32)
    assert len(tentative_matches(rows, np.vstack([rows, rows]), 0.99, one_to_one=True)[0]) == 0


@pytest.fixture(scope="module")
def collection() -> Stored:
    """One query; image n of 12 has some true matches: those of 2, 5, 7 and 9 are enough, 7 and 9 have equally many."""
    numbers = {2: 20, 4: 5, 5: 60, 7: 30, 9: 30}
    pairs = [planted(numbers.get(n, 0)) for n in range(12)]
    database = FeatureBatch.concatenate([database for _, database in pairs])
    return Stored(pairs[0][0], FeatureBatch(np.arange(12), database.offsets, database.descriptors, database.geometry))


def hits(ids: list[int]) -> Hits:
    return Hits(np.array([ids], np.int64), np.linspace(1, 0.5, len(ids), dtype=np.float32)[None])


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


def test_only_what_is_needed_is_read(collection):
    class Counting(Stored):
        asked: list[int] = []  # noqa: RUF012 - shared on purpose

        def features(self, channel: str, image_ids: Int64s) -> FeatureBatch:
            self.asked.extend(image_ids.tolist())
            return super().features(channel, image_ids)

    counting = Counting(collection.queries, collection.database)
    spec(top=3).build().rerank(hits([8, 3, 1, 2]), counting)
    assert counting.asked == [8, 3, 1]


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
