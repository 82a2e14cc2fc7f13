"""Weak geometric consistency: the histograms' peaks and what moves them."""

import numpy as np
import pytest

from cbir.rerank.wgc import Wgc
from cbir.types import FeatureBatch
from tests.rerank.scenes import NUM_FEATURES, image, moved, planted, stored
from tests.rerank.scenes import hits as ranking


def histograms(query: FeatureBatch, database: FeatureBatch, **fields: int) -> tuple[np.ndarray, np.ndarray]:
    spec = Wgc(channel="local", **fields)
    turns, scales = spec.build().histograms(query, database, spec.matcher()(query, database, np.zeros(1, np.int64)))
    return turns[0], scales[0]


def turned(batch: FeatureBatch, degrees: float, zoom: float = 1.0) -> FeatureBatch:
    """The whole image turned about its origin."""
    cosine, sine = zoom * np.cos(np.radians(degrees)), zoom * np.sin(np.radians(degrees))
    transform = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return image(moved(batch.geometry, transform), batch.descriptors, batch.words)


@pytest.mark.parametrize("bins", [1, 5, 40])
def test_turning_the_image_by_bins_shifts_the_peak_only(bins):
    query, database = planted(60)
    turns, scales = histograms(query, database)
    other_turns, other_scales = histograms(query, turned(database, bins * 360 / 64))
    assert turns.max() >= 60
    # A difference on the edge of two bins may fall on either side by the rounding of float32.
    assert np.abs(np.roll(turns, bins) - other_turns).max() <= 1
    assert other_turns.argmax() == (turns.argmax() + bins) % 64
    np.testing.assert_array_equal(scales, other_scales)


def test_zooming_the_image_by_bins_shifts_the_peak_only():
    query, database = planted(NUM_FEATURES)
    turns, scales = histograms(query, database)
    other_turns, other_scales = histograms(query, turned(database, 0, zoom=2 ** (3 * 8 / 32)))
    assert other_scales.argmax() == scales.argmax() + 3
    assert other_scales.max() == scales.max() == NUM_FEATURES
    np.testing.assert_array_equal(turns, other_turns)


def test_the_same_picture_votes_for_no_turn_and_no_zoom():
    query, _ = planted(0)
    turns, scales = histograms(query, query)
    assert turns.tolist() == [NUM_FEATURES, NUM_FEATURES, *[0] * 61, NUM_FEATURES]
    assert np.flatnonzero(scales).tolist() == [15, 16, 17]
    assert scales.max() == NUM_FEATURES


def test_changes_of_scale_out_of_range_do_not_vote():
    query, _ = planted(0)
    turns, scales = histograms(query, turned(query, 0, zoom=32))
    assert turns.max() == scales.max() == 0


def test_images_that_agree_come_first():
    context = stored({2: 40, 5: 90, 7: 60})
    found = Wgc(channel="local", min_votes=30).build().rerank(ranking([0, 9, 1, 2, 7, 3, 4, 5, 6]), context)
    assert found.image_ids.tolist() == [[5, 7, 2, 0, 9, 1, 3, 4, 6]]
    assert found.scores[0, 2] >= 30
    assert (np.floor(found.scores[0, 3:]) == 0).all()
