"""Binary descriptors: packed bits that are comparisons of grey values, and their Hamming distance."""

import cv2
import faiss
import numpy as np
import pytest

from cbir.features.descriptors.binary import Brief, BriskDescriptor, Freak, OrbDescriptor
from cbir.features.detectors.brisk import Brisk
from cbir.features.detectors.orb import Orb
from cbir.spec import methods
from tests.features.scenes import circles, quarter_turn, scene, turned

BINARY = ("akaze", "brief", "brisk", "freak", "orb")
BITS = {"akaze": 486, "brief": 256, "brisk": 512, "freak": 512, "orb": 256}


def rows_of(name: str, image: np.ndarray, **fields: object) -> np.ndarray:
    rows, kept = methods("descriptor")[name](**fields).build("cpu", {}).describe(image, circles())
    assert len(kept) > 30
    return rows


@pytest.mark.parametrize("name", BINARY)
def test_hamming_distances_of_an_index_are_popcounts_of_xor(name):
    rows = rows_of(name, scene())
    index = faiss.IndexBinaryFlat(8 * rows.shape[1])
    index.add(rows)
    distances, found = index.search(rows[:5], len(rows))
    brute = np.bitwise_count(rows[:5, None] ^ rows[None]).sum(axis=2, dtype=np.int64)
    assert np.array_equal(distances, np.take_along_axis(brute, found, axis=1))
    assert np.array_equal(found[:, 0], np.arange(5))


@pytest.mark.parametrize("name", BINARY)
def test_rows_hold_as_many_bits_as_declared(name):
    rows = rows_of(name, scene())
    assert rows.dtype == np.uint8
    assert rows.shape[1] == -(-BITS[name] // 8)
    shares = np.unpackbits(rows, axis=1, bitorder="little").mean(axis=0)
    assert (shares[: BITS[name]] > 0).mean() > 0.95
    assert not shares[BITS[name] :].any()


@pytest.mark.parametrize("name", ["brief", "orb"])
def test_bits_are_comparisons_so_that_a_negative_picture_has_the_opposite_ones(name):
    image = scene()
    same_bits = 1 - np.unpackbits(rows_of(name, image) ^ rows_of(name, 255 - image), axis=1).mean()
    # Equal grey values give 0 in both.
    assert same_bits < 0.25


def test_orb_is_steered_by_the_angle_and_upright_brief_is_not():
    image, table = scene(), circles()
    for spec, least, most in ((OrbDescriptor(), 0.0, 0.15), (Brief(), 0.3, 0.7)):
        descriptor = spec.build("cpu", {})
        plain, kept = descriptor.describe(image, table)
        again, also_kept = descriptor.describe(quarter_turn(image), turned(table, image.shape[0]))
        _, one, other = np.intersect1d(kept, also_kept, return_indices=True)
        assert least <= np.unpackbits(plain[one] ^ again[other], axis=1).mean() < most


@pytest.mark.parametrize("bits", [128, 256, 512])
def test_brief_has_as_many_bits_as_asked_for(bits):
    assert rows_of("brief", scene(), bits=bits).shape[1] == bits // 8


def test_orb_describes_its_own_keypoints_as_opencv_does():
    image = scene()
    keypoints, expected = cv2.ORB.create(300).detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    table = Orb().build("cpu", {}, 300).detect(image)
    rows, kept = OrbDescriptor().build("cpu", {}).describe(image, table)
    assert len(kept) == len(keypoints) > 100
    assert np.array_equal(rows, expected)


def test_brisk_shares_its_work_only_where_the_pattern_is_the_same():
    assert BriskDescriptor().one_pass(Brisk(), 10) is not None
    assert BriskDescriptor(pattern_scale=2.0).one_pass(Brisk(), 10) is None
    assert BriskDescriptor().one_pass(Orb(), 10) is None


def test_who_turns_by_itself_says_so():
    assert [spec.turns_by_itself for spec in (BriskDescriptor(), Freak(), Freak(oriented=False), OrbDescriptor())] == [
        True,
        True,
        False,
        False,
    ]
