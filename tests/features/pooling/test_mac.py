"""Maximum poolings against plain loops."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cbir.features.pooling.mac import BlockwiseMax, Mac, Rmac
from tests.features.pooling.maps import maps


def squares(height: int, width: int, levels: int = 3) -> list[tuple[int, int, int]]:
    """Top, left and side, level by level, with steps and overlaps as in the paper, in plain floating point."""
    shorter, longer = min(height, width), max(height, width)
    overlaps = [1 - (longer - shorter) / (steps - 1) / shorter for steps in range(2, 8)]
    more = 0 if height == width else int(np.argmin([abs(overlap - 0.4) for overlap in overlaps])) + 1
    found = []
    for level in range(1, levels + 1):
        side = int(2 * shorter / (level + 1))
        down, across = (level + (more if length > shorter else 0) for length in (height, width))
        tops, lefts = (
            np.floor(np.linspace(0, length - side, number) + 1e-9).astype(int).tolist() if number > 1 else [0]
            for length, number in ((height, down), (width, across))
        )
        found += [(top, left, side) for top in tops for left in lefts if side]
    return found


def test_mac_does_not_change_under_a_cyclic_shift():
    activations = maps()
    assert torch.equal(Mac().pool(activations), Mac().pool(activations.roll((2, 3), (2, 3))))
    assert torch.equal(Mac().pool(activations), activations.reshape(3, 5, -1).max(dim=2).values)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (7, 7), (7, 9), (24, 16), (10, 31), (3, 2), (1, 5)])
def test_rmac_is_the_sum_of_normalised_macs_of_its_squares(height, width):
    activations = maps((2, 5, height, width))
    expected = torch.zeros(2, 5)
    for top, left, side in squares(height, width):
        assert top + side <= height
        assert left + side <= width
        expected += normalize(activations[:, :, top : top + side, left : left + side].amax((2, 3)))
    assert torch.allclose(Rmac().pool(activations), expected, atol=1e-5)


def test_a_square_map_has_1_and_4_and_9_regions():
    levels = list(Rmac().regions(12, 12))
    assert [(side, len(rows) * len(columns)) for side, rows, columns in levels] == [(12, 1), (8, 4), (6, 9)]
    assert levels[2][1:] == ([0, 3, 6], [0, 3, 6])


def test_about_20_regions_of_a_photograph():
    assert [len(rows) * len(columns) for _, rows, columns in Rmac().regions(24, 32)] == [2, 6, 12]


@pytest.mark.parametrize(("longer", "number"), [(13, 2), (16, 2), (23, 3), (27, 4), (40, 6), (48, 7), (99, 7)])
def test_neighbours_of_the_first_level_overlap_by_about_two_fifths(longer, number):
    """Of ten places, 6 more are one more square."""
    ((side, rows, columns),) = Rmac(levels=1).regions(10, longer)
    assert (side, rows, len(columns)) == (10, [0], number)
    assert (columns[0], columns[-1]) == (0, longer - 10)
    ((_, turned, one),) = Rmac(levels=1).regions(longer, 10)
    assert (turned, one) == (columns, [0])


def test_one_region_is_the_normalised_mac():
    activations = maps((2, 5, 8, 8))
    expected = normalize(Mac().pool(activations))
    assert torch.allclose(Rmac(levels=1).pool(activations), expected, atol=1e-6)
    assert torch.allclose(Rmac(levels=1, whole=True).pool(activations), 2 * expected, atol=1e-6)


def test_the_whole_map_is_one_region_more():
    activations = maps((2, 5, 7, 11))
    added = Rmac(whole=True).pool(activations) - Rmac().pool(activations)
    assert torch.allclose(added, normalize(Mac().pool(activations)), atol=1e-5)


def test_levels_without_a_place_are_left_out():
    assert [side for side, _, _ in Rmac(levels=5).regions(2, 2)] == [2, 1, 1]


def test_tiles_are_concatenated_tile_by_tile():
    activations = maps((3, 5, 6, 8))
    found = BlockwiseMax(rows=3, columns=2).pool(activations)
    tiles = [activations[:, :, y : y + 2, x : x + 4].amax((2, 3)) for y in (0, 2, 4) for x in (0, 4)]
    assert torch.equal(found, torch.cat(tiles, dim=1))


def test_one_tile_is_mac_and_one_for_each_place_is_the_map():
    activations = maps((3, 5, 4, 6))
    assert torch.equal(BlockwiseMax(rows=1, columns=1).pool(activations), Mac().pool(activations))
    every = BlockwiseMax(rows=4, columns=6).pool(activations)
    assert torch.equal(every, activations.permute(0, 2, 3, 1).reshape(3, -1))
