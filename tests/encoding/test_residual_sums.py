import numpy as np
import pytest

from cbir.encoding.multivlad import TILES, MultiVlad
from cbir.encoding.parts import cell_boxes, cells_of, image_box
from cbir.encoding.residual_sums import ResidualSums
from cbir.encoding.rvlad import RVlad
from cbir.encoding.vlad import Vlad, normalised_vlad
from cbir.encoding.vlad_of_sums import VladOfSums
from cbir.errors import DataError
from cbir.types import FeatureBatch, Regions

WORDS, DIM, HEIGHT, WIDTH = 8, 16, 300, 400


def features(seed=0, counts=(60, 0, 45, 80), sizes=True, boxes=None):
    rng = np.random.default_rng(seed)
    total = sum(counts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    geometry = np.zeros((total, 4), np.float32)
    geometry[:, :2] = rng.random((total, 2)) * [WIDTH - 1, HEIGHT - 1]
    known = np.tile(np.array([HEIGHT, WIDTH], np.int32), (len(counts), 1)) if sizes else np.empty((0, 2), np.int32)
    rows = rng.normal(size=(total, DIM)).astype(np.float32)
    return FeatureBatch(np.arange(len(counts)) + 7, offsets, rows, geometry, known, boxes)


@pytest.fixture(scope="module")
def sample():
    return features(99, (200, 300))


def sums_of(batch, sample, parts="image"):
    return ResidualSums(words=WORDS, parts=parts).fit(sample, 3).encode(batch)


def regions(*boxes):
    counts = [len(part) for part in boxes]
    stacked = np.concatenate([np.asarray(part, np.float32).reshape(-1, 4) for part in boxes])
    return Regions(np.concatenate([[0], np.cumsum(counts)]), stacked)


def test_rows_hold_raw_sums_and_counts(sample):
    batch = features()
    encoder = ResidualSums(words=WORDS).fit(sample, 3)
    encoded = encoder.encode(batch)
    centroids = encoder.state()["centroids"]
    for i in range(len(batch)):
        rows = batch.descriptors[batch.rows(i)].astype(np.float64)
        words = ((rows[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
        expected = np.stack([(rows[words == word] - centroids[word]).sum(axis=0) for word in range(WORDS)])
        np.testing.assert_allclose(encoded.descriptors[i, :-WORDS], expected.ravel(), atol=1e-5)
        np.testing.assert_array_equal(encoded.descriptors[i, -WORDS:], np.bincount(words, minlength=WORDS))


def test_vlad_of_sums_is_vlad_to_the_byte(sample):
    batch, summed = features(), sums_of(features(), sample)
    for settings in ({}, {"alpha": 0.3}, {"alpha": 1.0, "intra": False}, {"intra": False}):
        whole = Vlad(words=WORDS, **settings).fit(sample, 3).encode(batch)
        parted = VladOfSums(words=WORDS, **settings).fit(sums_of(sample, sample), 0).encode(summed)
        assert parted.descriptors.tobytes() == whole.descriptors.tobytes()
        np.testing.assert_array_equal(parted.image_ids, batch.image_ids)


def test_what_was_stored_gives_the_same_vectors(sample):
    summed = sums_of(features(boxes=regions([], [], [[0, 0, 200, 300], [0, 0, 400, 300]], [])), sample, "regions")
    encoder = RVlad(words=WORDS).fit(summed, 0)
    again = encoder.encode(FeatureBatch.from_arrow(summed.to_arrow()))
    assert again.descriptors.tobytes() == encoder.encode(summed).descriptors.tobytes()


def test_the_cells_divide_the_image(sample):
    batch = features()
    cells, whole = sums_of(batch, sample, "cells"), sums_of(batch, sample)
    assert cells.counts.tolist() == [9] * 4
    totals = cells.descriptors.reshape(4, 9, -1).sum(axis=1)
    np.testing.assert_allclose(totals, whole.descriptors, atol=1e-4)
    np.testing.assert_array_equal(totals[:, -WORDS:], whole.descriptors[:, -WORDS:])
    by_hand = (batch.geometry[:60, 1] + 0.5) // 100 * 3 + (batch.geometry[:60, 0] + 0.5) // (WIDTH / 3)
    found = cells.descriptors[:9, -WORDS:].sum(axis=1)
    np.testing.assert_array_equal(found, np.bincount(by_hand.astype(int), minlength=9))


def test_cells_have_their_boxes(sample):
    encoded = sums_of(features(), sample, "cells")
    assert encoded.regions is not None
    boxes = encoded.regions.of(0)
    np.testing.assert_allclose(boxes[5], [WIDTH * 2 / 3, 100, WIDTH, 200], rtol=1e-6)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert areas.sum() == pytest.approx(WIDTH * HEIGHT)


def test_an_image_of_unknown_size_is_the_box_of_its_features():
    batch = features(sizes=False)
    points = batch.geometry[batch.rows(0), :2] + 0.5
    np.testing.assert_array_equal(image_box(batch, 0), [*points.min(axis=0), *points.max(axis=0)])
    np.testing.assert_array_equal(image_box(batch, 1), np.zeros(4))
    cells = cells_of(points, image_box(batch, 0), 3)
    assert set(cells) == set(range(9))
    assert cells_of(points[:1], np.concatenate([points[0], points[0]]), 3).tolist() == [0]
    assert cells_of(np.array([[-5, -5], [500, 500]]), np.array([0, 0, 10, 10], np.float32), 3).tolist() == [0, 8]


def test_features_without_positions_have_no_cells(sample):
    batch = FeatureBatch.of_global(np.arange(3), np.ones((3, DIM), np.float32))
    assert sums_of(batch, sample).counts.tolist() == [1, 1, 1]
    assert sums_of(batch, sample, "regions").counts.tolist() == [1, 1, 1]
    with pytest.raises(DataError, match="no positions"):
        sums_of(batch, sample, "cells")


def test_a_region_holds_the_features_whose_centre_lies_in_it(sample):
    boxes = regions([[0, 0, 200, 300], [100, 100, 300, 200]], [], [[0, 0, WIDTH, HEIGHT]], [])
    batch = features(boxes=boxes)
    encoded, whole = sums_of(batch, sample, "regions"), sums_of(batch, sample)
    assert encoded.counts.tolist() == [2, 1, 1, 1]
    x, y = batch.geometry[:60, :2].T + 0.5
    counts = encoded.descriptors[:, -WORDS:].sum(axis=1)
    assert counts[:2].tolist() == [(x < 200).sum(), ((x >= 100) & (x < 300) & (y >= 100) & (y < 200)).sum()]
    np.testing.assert_array_equal(encoded.descriptors[2:], whole.descriptors[1:])
    assert encoded.regions is not None
    np.testing.assert_array_equal(encoded.regions.of(3), [[0, 0, WIDTH, HEIGHT]])
    np.testing.assert_array_equal(encoded.regions.of(0), boxes.of(0))


def test_far_features_are_neither_summed_nor_counted(sample):
    near = ResidualSums(words=WORDS, max_distance=1e-3).fit(sample, 3).encode(features())
    assert not near.descriptors.any()
    far = ResidualSums(words=WORDS, max_distance=1e6).fit(sample, 3).encode(features())
    assert far.descriptors.tobytes() == sums_of(features(), sample).descriptors.tobytes()


def test_adaptation_is_vlad_with_the_means_as_words(sample):
    """All about VLAD, section 3.2, from sums and counts alone."""
    database = features(5, (300, 250, 200))
    plain = ResidualSums(words=WORDS).fit(sample, 3)
    centroids = plain.state()["centroids"]
    adapted = VladOfSums(words=WORDS, adapt=True, alpha=1.0, intra=False).fit(plain.encode(database), 0)
    words = ((database.descriptors[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    means = np.stack([database.descriptors[words == word].mean(axis=0, dtype=np.float64) for word in range(WORDS)])
    np.testing.assert_allclose(centroids + adapted.shifts, means, atol=1e-5)
    sums = np.zeros((3, WORDS, DIM))
    np.add.at(sums, (np.repeat(np.arange(3), database.counts), words), database.descriptors - means[words])
    expected = sums.reshape(3, -1) / np.linalg.norm(sums.reshape(3, -1), axis=1, keepdims=True)
    np.testing.assert_allclose(adapted.encode(plain.encode(database)).descriptors, expected, atol=1e-6)
    np.testing.assert_allclose(sums.sum(axis=0), 0, atol=1e-3)


def test_adaptation_is_additive_over_shards(sample):
    database = features(6, (100, 90, 80, 70))
    plain = ResidualSums(words=WORDS).fit(sample, 3)
    spec = VladOfSums(words=WORDS, adapt=True)
    whole = spec.fit(plain.encode(database), 0)
    parts = [plain.encode(database.take(np.array(some))) for some in ([0, 1], [2, 3])]
    assert spec.fit(FeatureBatch.concatenate(parts), 0).shifts.tobytes() == whole.shifts.tobytes()
    cells = ResidualSums(words=WORDS, parts="cells").fit(sample, 3).encode(database)
    np.testing.assert_allclose(MultiVlad(words=WORDS, adapt=True).fit(cells, 0).shifts, whole.shifts, atol=1e-5)


def test_a_word_that_no_feature_has_does_not_move(sample):
    plain = ResidualSums(words=WORDS).fit(sample, 3)
    centroids = plain.state()["centroids"]
    some = FeatureBatch.of_global(np.arange(4), centroids[:4] + np.float32(0.01))
    shifts = VladOfSums(words=WORDS, adapt=True).fit(plain.encode(some), 0).shifts
    np.testing.assert_allclose(shifts[:4], 0.01, atol=1e-6)
    assert not shifts[4:].any()


def test_other_rows_than_residual_sums_are_refused(sample):
    summed = sums_of(sample, sample)
    with pytest.raises(DataError, match=r"words: rows with D = 136 are no residual sums of 4 words"):
        VladOfSums(words=4).fit(summed, 0)
    with pytest.raises(DataError, match="no residual sums of 5 words"):
        VladOfSums(words=5).fit(summed, 0)


def test_multivlad_tiles_are_sums_of_cells(sample):
    batch = features()
    cells = sums_of(batch, sample, "cells")
    encoded = MultiVlad(words=WORDS).fit(cells, 0).encode(cells)
    assert encoded.counts.tolist() == [14] * 4
    assert [len(tile) for tile in TILES] == [1] * 9 + [4] * 4 + [9]
    assert encoded.regions is not None
    boxes = encoded.regions.of(0)
    x, y = batch.geometry[:60, :2].T + 0.5
    plain = Vlad(words=WORDS).fit(sample, 3)
    for row, (left, top, right, bottom) in zip(encoded.descriptors, boxes, strict=False):
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        alone = FeatureBatch.of_images(np.arange(1), [batch.descriptors[:60][inside]])
        np.testing.assert_allclose(row, plain.encode(alone).descriptors[0], atol=1e-3)
    np.testing.assert_allclose(encoded.descriptors[13::14], plain.encode(batch).descriptors, atol=1e-3)
    np.testing.assert_array_equal(boxes[13], [0, 0, WIDTH, HEIGHT])
    assert not encoded.descriptors[14:28].any()


def test_multivlad_needs_cells(sample):
    summed = sums_of(sample, sample)
    with pytest.raises(DataError, match="parts: cells"):
        MultiVlad(words=WORDS).fit(summed, 0).encode(summed)


def test_every_tile_of_a_query_object_finds_it(sample):
    """An object in one corner, clutter elsewhere: a tile is far nearer to it than the whole image is."""
    rng = np.random.default_rng(8)
    scene = features(9, (90,))
    scene.geometry[:30, :2] = rng.random((30, 2)) * [WIDTH / 3 - 1, 99]
    scene.geometry[30:, :2] = [WIDTH / 2, HEIGHT / 2] + rng.random((60, 2)) * [150, 100]
    cells = sums_of(scene, sample, "cells")
    tiles = MultiVlad(words=WORDS).fit(sums_of(sample, sample, "cells"), 0).encode(cells).descriptors
    query = FeatureBatch.of_images(np.arange(1), [scene.descriptors[:30]])
    similarities = tiles @ Vlad(words=WORDS).fit(sample, 3).encode(query).descriptors[0]
    assert similarities.argmax() == 0
    assert similarities[0] == pytest.approx(1, abs=1e-3)
    assert similarities[13] < 0.9


def test_a_query_of_multivlad_is_whole(sample):
    cells = sums_of(features(), sample, "cells")
    encoder = MultiVlad(words=WORDS).fit(cells, 0)
    queries, images = encoder.encode_queries(cells), encoder.encode(cells)
    assert queries.counts.tolist() == [1] * 4
    np.testing.assert_array_equal(queries.descriptors, images.descriptors[13::14])
    summed = sums_of(features(), sample)
    plain = VladOfSums(words=WORDS).fit(summed, 0)
    assert plain.encode_queries(summed).descriptors.tobytes() == plain.encode(summed).descriptors.tobytes()


def test_rvlad_is_the_mean_similarity_of_the_regions(sample):
    batch = features(boxes=regions([[0, 0, 200, 300], [100, 50, 400, 300], [0, 0, 400, 300]], [], [], [[0, 0, 90, 90]]))
    summed = sums_of(batch, sample, "regions")
    mean = RVlad(words=WORDS).fit(summed, 0).encode(summed).descriptors
    each = VladOfSums(words=WORDS, each=True).fit(summed, 0).encode(summed)
    assert each.regions is not None
    np.testing.assert_array_equal(each.counts, summed.counts)
    query = Vlad(words=WORDS).fit(sample, 3).encode(features(11)).descriptors[0]
    expected = [np.mean(each.descriptors[each.rows(i)] @ query) for i in range(4)]
    np.testing.assert_allclose(mean @ query, expected, atol=1e-6)
    assert np.linalg.norm(mean[0]) < 1


def test_rvlad_of_one_region_is_vlad(sample):
    summed = sums_of(features(), sample, "regions")
    found = RVlad(words=WORDS).fit(summed, 0).encode(summed).descriptors
    np.testing.assert_array_equal(found, Vlad(words=WORDS).fit(sample, 3).encode(features()).descriptors)


def test_regions_survive_an_empty_shard(sample):
    cells = sums_of(features(), sample, "cells")
    encoder = MultiVlad(words=WORDS).fit(cells, 0)
    parts = [encoder.encode(cells.take(np.array(some, np.int64))) for some in ([], [0, 1, 2, 3])]
    joined, whole = FeatureBatch.concatenate(parts).regions, encoder.encode(cells).regions
    assert joined is not None
    assert whole is not None
    assert joined.boxes.tobytes() == whole.boxes.tobytes()


def test_cell_boxes_row_by_row():
    boxes = cell_boxes(np.array([0, 0, 30, 60], np.float32), 3)
    assert boxes[1].tolist() == [10, 0, 20, 20]
    assert boxes[3].tolist() == [0, 20, 10, 40]


def test_normalised_vlad_of_no_features_is_zero():
    assert not normalised_vlad(np.zeros((2, 3, 4)), 0.5, True).any()
