"""Regional aggregation against its definition, region by region."""

import numpy as np
import pytest
from pydantic import ValidationError

from cbir.encoding.per_region import BLOCK_IMAGES, PerRegion
from cbir.encoding.vlad import Vlad
from cbir.features.regions.grid import Grid
from cbir.index.flat import Flat
from cbir.types import FeatureBatch, ImageBatch, Regions

DIM, WORDS, SEED = 8, 4, 0
VLAD = {"name": "vlad", "words": WORDS}


def features(num_images: int = 12, seed: int = 0, most: int = 60) -> FeatureBatch:
    """Features anywhere in images of 200 x 150 pixels, every fourth image without any, with 14 tiles each."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, most, num_images) * (np.arange(num_images) % 4 != 3)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    geometry = rng.uniform((0, 0, 1, 0), (199, 149, 9, 360), (offsets[-1], 4)).astype(np.float32)
    sizes = np.tile(np.array([150, 200], np.int32), (num_images, 1))
    ids = np.arange(num_images) + 1000 * (seed + 1)
    images = ImageBatch(ids, [np.zeros((1, 1, 3), np.uint8)] * num_images, sizes)
    regions = Grid().build("cpu", {}).propose(images)
    rows = rng.normal(size=(offsets[-1], DIM)).astype(np.float32)
    return FeatureBatch(ids, offsets, rows, geometry, sizes, regions)


def whole(batch: FeatureBatch) -> FeatureBatch:
    return FeatureBatch(batch.image_ids, batch.offsets, batch.descriptors, batch.geometry, batch.sizes)


def one_by_one(batch: FeatureBatch, encoder) -> list[np.ndarray]:
    """Per image the rows of its regions, each region as an image of its own."""
    found = []
    for i in range(len(batch)):
        x, y = batch.geometry[batch.rows(i), :2].T + 0.5
        rows = []
        for left, top, right, bottom in batch.regions.of(i):
            inside = batch.descriptors[batch.rows(i)][(left <= x) & (x < right) & (top <= y) & (y < bottom)]
            crop = FeatureBatch(np.zeros(1, np.int64), np.array([0, len(inside)]), inside)
            rows.append(encoder.encode(crop).descriptors[0])
        found.append(np.stack(rows))
    return found


@pytest.fixture(scope="module")
def vlad():
    return Vlad(words=WORDS).fit(whole(features()), SEED)


def encoder_of(similarity: str):
    return PerRegion(encoder=VLAD, similarity=similarity).fit(features(), SEED)


def test_every_region_has_the_row_of_its_own_features(vlad):
    batch = features(BLOCK_IMAGES + 5, seed=1, most=30)
    encoded = encoder_of("max").encode(batch)
    assert np.array_equal(encoded.offsets, batch.regions.offsets)
    assert np.array_equal(encoded.regions.boxes, batch.regions.boxes)
    expected = np.concatenate(one_by_one(batch, vlad))
    assert encoded.descriptors.tobytes() == expected.tobytes()
    assert np.any(expected[1:14] != expected[0])


def test_mean_similarity_is_the_mean_of_the_regions_similarities(vlad):
    """Eq. 4 of Teichmann et al. 2019: q . V_R(n) = mean over r of q . V(n, r), whose vectors have length one."""
    batch, queries = features(seed=1), vlad.encode(whole(features(5, seed=2))).descriptors
    pooled = encoder_of("mean").encode(batch)
    assert (pooled.counts == 1).all()
    for image, rows in zip(pooled.descriptors, one_by_one(batch, vlad), strict=True):
        np.testing.assert_allclose(queries @ image, (queries @ rows.T).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("similarity", ["max", "mean"])
def test_a_search_over_regions_is_the_one_by_brute_force(vlad, similarity):
    batch, queries = features(40, seed=1), vlad.encode(whole(features(6, seed=2)))
    encoded = encoder_of(similarity).encode(batch)
    index = Flat().train(encoded, SEED)
    hits = index.build(index.entries(encoded)).search(queries, 10)
    pool = np.max if similarity == "max" else np.mean
    regions = one_by_one(batch, vlad)
    scores = np.stack([pool(queries.descriptors @ rows.T, axis=1) for rows in regions], axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, best, 1), atol=1e-6)
    # The fourth query has no features, so that all scores of it are 0.
    assert np.array_equal(hits.image_ids[:3], batch.image_ids[best[:3]])


def test_with_one_region_max_and_mean_are_the_whole_image(vlad):
    batch = features(seed=1)
    boxes = np.tile(np.float32([0, 0, 200, 150]), (len(batch), 1))
    one = FeatureBatch(
        batch.image_ids,
        batch.offsets,
        batch.descriptors,
        batch.geometry,
        batch.sizes,
        Regions(np.arange(len(batch) + 1), boxes),
    )
    expected = vlad.encode(whole(batch)).descriptors.tobytes()
    for similarity in ("max", "mean"):
        assert encoder_of(similarity).encode(one).descriptors.tobytes() == expected
        assert encoder_of(similarity).encode(whole(batch)).descriptors.tobytes() == expected


def test_an_image_without_a_box_is_one_region(vlad):
    batch = features(2, seed=1)
    none = FeatureBatch(
        batch.image_ids,
        batch.offsets,
        batch.descriptors,
        batch.geometry,
        batch.sizes,
        Regions(np.array([0, 0, 14]), batch.regions.of(1)),
    )
    encoded = encoder_of("max").encode(none)
    assert encoded.counts.tolist() == [1, 14]
    assert encoded.regions.of(0).tolist() == [[0, 0, 200, 150]]
    assert encoded.descriptors[0].tobytes() == vlad.encode(whole(batch)).descriptors[0].tobytes()


@pytest.mark.parametrize("similarity", ["max", "mean"])
def test_a_batch_with_regions_may_be_cut_anywhere(similarity):
    batch, encoder = features(9, seed=3), encoder_of(similarity)
    parts = [encoder.encode(batch.take(np.arange(a, b))) for a, b in ((0, 1), (1, 6), (6, 9))]
    together = encoder.encode(batch)
    assert FeatureBatch.concatenate(parts).to_arrow().equals(together.to_arrow(), check_metadata=True)


def test_it_is_trained_as_on_whole_images(vlad):
    assert encoder_of("max").state()["centroids"].tobytes() == vlad.state()["centroids"].tobytes()


def test_its_identity_has_the_version_of_its_encoder():
    assert PerRegion(encoder=VLAD).identity()["encoder"] == Vlad(words=WORDS).identity()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"name": "l2"}, "l2 does not make one row of local features"),
        ({"name": "per_region", "encoder": VLAD}, "per_region does not make one row"),
        ({"name": "vlda"}, "'vlda'"),
        ({"words": 3}, "name"),
        ({"name": "vlad", "wrods": 3}, "unknown key 'wrods'; did you mean 'words'?"),
    ],
)
def test_its_encoder_must_aggregate(encoder, message):
    with pytest.raises(ValidationError, match=message):
        PerRegion(encoder=encoder)


def test_the_schema_names_the_encoders():
    names = PerRegion.model_json_schema()["properties"]["encoder"]["properties"]["name"]["enum"]
    assert "vlad" in names
    assert "l2" not in names
    assert "per_region" not in names
