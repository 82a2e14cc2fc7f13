"""Part-based descriptors: identities of parts and places."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from cbir.features.pooling.parts import Parts
from cbir.features.pooling.spoc import Spoc
from tests.features.pooling.maps import maps

WHOLE = (0.0, 0.0, 1.0, 1.0)


def test_one_part_of_the_whole_image_is_spoc():
    activations = maps()
    assert torch.allclose(Parts(boxes=(WHOLE,)).pool(activations), normalize(Spoc().pool(activations)), atol=1e-6)


def test_the_halves_are_side_by_side():
    activations = maps((2, 5, 8, 6))
    upper, lower = (normalize(half.mean((2, 3))) for half in (activations[:, :, :4], activations[:, :, 4:]))
    assert torch.allclose(Parts().pool(activations), torch.cat([upper, lower], dim=1), atol=1e-6)


def test_a_place_at_the_border_counts_by_the_part_of_it_that_lies_inside():
    activations = maps((2, 5, 4, 5))
    rows, columns = torch.tensor([0.0, 0.6, 1.0, 0.0]), torch.tensor([0.5, 1.0, 1.0, 0.25, 0.0])
    weights = rows[:, None] * columns
    expected = (activations * weights).sum((2, 3)) / weights.sum()
    found = Parts(boxes=((0.1, 0.35, 0.65, 0.75),)).pool(activations)
    assert torch.allclose(found, normalize(expected), atol=1e-5)


def test_a_part_in_which_nothing_shows_adds_nothing():
    seen, hidden = maps((1, 5, 8, 6)), maps((1, 5, 8, 6))
    hidden[:, :, 4:] = 0
    one, other = Parts().pool(seen), Parts().pool(hidden)
    assert not other[0, 5:].any()
    assert (one @ other.T).item() == pytest.approx((one[:, :5] @ other[:, :5].T).item(), abs=1e-6)


@pytest.mark.parametrize("box", [(0.5, 0.0, 0.5, 1.0), (0.0, 0.8, 1.0, 0.2)])
def test_a_box_without_an_area_is_refused(box):
    with pytest.raises(ValidationError, match=r"boxes: .* is empty; give left, top, right, bottom"):
        Parts(boxes=(WHOLE, box))


def test_boxes_lie_within_the_image():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Parts(boxes=((0.0, 0.0, 100.0, 50.0),))
