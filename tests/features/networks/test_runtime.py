"""Passes of a fixed size that overlap, and give way where memory is short."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cbir.errors import ConfigError
from cbir.features.networks import runtime
from cbir.features.networks.runtime import Passes
from cbir.types import Floats, Pixels

CPU = torch.device("cpu")


def picture(seed: int = 0, height: int = 64, width: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = [picture(seed) for seed in range(5)]


class Sums:
    """A network that adds up pixels, on a device for so many images at a time."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sums = images.flatten(1).sum(1, keepdim=True).float()
        return [sums, torch.cat([sums, -sums], dim=1)]


def assert_sums(found: list[list[Floats]], groups: list[list[Pixels]]) -> None:
    assert len(found) == len(groups)
    for (sums, both), images in zip(found, groups, strict=True):
        expected = np.array([[image.sum(dtype=np.int64)] for image in images], np.float32)
        assert np.array_equal(sums, expected)
        assert np.array_equal(both, np.hstack([expected, -expected]))


GROUPS = [PICTURES[:4], [picture(9, 32, 48)], PICTURES[1:4]]


def test_passes_are_always_as_large():
    sums = Sums()
    assert_sums(list(Passes(sums, CPU, 4).rows(GROUPS)), GROUPS)
    assert sums.sizes == [4, 4, 4]


def test_without_groups_there_are_no_rows():
    assert list(Passes(Sums(), CPU, 4).rows([])) == []


def test_the_next_pass_is_begun_before_the_rows_of_one_are_awaited():
    sums = Sums()
    rows = Passes(sums, CPU, 4).rows(GROUPS)
    next(rows)
    assert len(sums.sizes) == 2
    next(rows)
    assert len(sums.sizes) == 3


def test_groups_are_taken_as_they_are_needed():
    taken = []

    def groups() -> Iterator[list[Pixels]]:
        for group in GROUPS * 4:
            taken.append(group)
            yield group

    next(Passes(Sums(), CPU, 4).rows(groups()))
    assert len(taken) == runtime.IN_FLIGHT


def test_out_of_memory_halves_the_passes_and_goes_on(caplog):
    sums = Sums(room=2)
    passes = Passes(sums, CPU, 8)
    groups = [[picture(seed) for seed in range(7)], PICTURES]
    assert_sums(list(passes.rows(groups)), groups)
    assert sums.sizes == [8, 4, *[2] * 4, *[2] * 3]
    assert passes.size == 2
    assert "passes of 2 images from now on" in caplog.text


def test_memory_that_fails_in_the_middle_of_a_group_loses_and_repeats_no_image():
    sums = Sums()
    passes = Passes(sums, CPU, 2)
    groups = [PICTURES[:2], PICTURES]
    rows = passes.rows(iter(groups))
    first = next(rows)
    sums.room = 1
    assert_sums([first, *rows], groups)


def test_a_single_image_that_does_not_fit_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"extractor.size: one image of 64 x 64 pixels does not fit .* of cpu; use"):
        list(Passes(Sums(room=0), CPU, 8).rows([PICTURES]))
