"""Fast-Hessian: box filters against the same filters as correlation, blobs at their scale, and the missing SURF."""

import cv2
import numpy as np
import pytest

from cbir.errors import ConfigError
from cbir.features import opencv
from cbir.features.detectors import fast_hessian
from cbir.features.detectors.fast_hessian import FastHessian, box_hessian, filter_sizes
from cbir.features.keypoints import by_strength
from cbir.features.opencv import grey
from tests.features.scenes import blob, scene


def kernels(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The filters of Bay's figure, for xx, yy and xy."""
    lobe, middle = size // 3, size // 2
    yy = np.zeros((size, size))
    band = slice(middle - lobe + 1, middle + lobe)
    yy[:, band] = 1
    yy[lobe : 2 * lobe, band] = -2
    xy = np.zeros((size, size))
    before, after = slice(middle - lobe, middle), slice(middle + 1, middle + 1 + lobe)
    xy[before, before] = xy[after, after] = 1
    xy[before, after] = xy[after, before] = -1
    return yy.T, yy, xy


def test_filters_grow_as_in_the_paper():
    assert [filter_sizes(octave) for octave in range(3)] == [[9, 15, 21, 27], [15, 27, 39, 51], [27, 51, 75, 99]]


@pytest.mark.parametrize(("size", "step"), [(9, 1), (15, 2), (27, 4)])
def test_determinants_are_those_of_the_correlation(size, step):
    picture = grey(scene())
    xx, yy, xy = (cv2.filter2D(picture.astype(float), -1, kernel) for kernel in kernels(size))
    expected = (81 / 15 / size**2) ** 2 * (xx * yy - 0.81 * xy**2)
    expected[: size // 2] = expected[:, : size // 2] = 0
    expected[-(size // 2) :] = expected[:, -(size // 2) :] = 0
    found = box_hessian(cv2.integral(picture, sdepth=cv2.CV_64F), size, step)
    assert np.allclose(found, expected[::step, ::step], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("std", [4.0, 8.0, 16.0])
def test_a_blob_is_found_in_its_centre_at_its_scale(std):
    table = FastHessian().build("cpu", {}, 1000).detect(blob(std, 240))
    x, y, size, angle, _ = table[by_strength(table)][0]
    assert (x, y) == pytest.approx((120, 120), abs=0.5)
    # Boxes are coarse: the paper's scale of a Gaussian blob is 0.7 of its standard deviation, at any size.
    assert size / std == pytest.approx(1.41, rel=0.05)
    assert angle == 0


def test_responses_pass_the_threshold_and_grow_with_the_square_of_contrast():
    image = scene() // 2
    low, high = (FastHessian(threshold=value).build("cpu", {}, 1000).detect(image) for value in (100, 400))
    assert low[:, 4].min() > 100
    assert 20 < len(high) < len(low)
    brighter = (
        FastHessian(threshold=400).build("cpu", {}, 1000).detect(np.repeat(grey(image)[..., None] * 2, 3, axis=2))
    )
    assert len(brighter) == len(low)
    assert np.allclose(brighter[:, 4], 4 * low[:, 4], rtol=1e-4)


def test_a_library_without_surf_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"without SURF .*OPENCV_ENABLE_NONFREE.*implementation: own"):
        FastHessian(implementation="opencv").build("cpu", {}, 1000)


def test_a_library_with_surf_is_asked_with_our_settings(monkeypatch):
    class Surf:
        @staticmethod
        def create(*settings: float) -> "Surf":
            assert settings == (250.0, 3)
            return Surf()

        def detect(self, picture: np.ndarray, mask: None) -> list[cv2.KeyPoint]:
            return [cv2.KeyPoint(5.0, 6.0, 9.0, 77.0, 500.0)]

    monkeypatch.setattr(fast_hessian, "algorithm", lambda name: {"SURF": Surf}[name])
    detector = FastHessian(implementation="opencv", threshold=250, octaves=3).build("cpu", {}, 1000)
    assert np.allclose(detector.detect(scene()), [[5, 6, 2.4, 0, 500]])


def test_an_algorithm_that_the_library_lacks_is_named():
    with pytest.raises(ConfigError, match=r"without NoSuchThing; install opencv-contrib-python-headless"):
        opencv.algorithm("NoSuchThing")
