"""What every extractor owes: the role's specification, run on all registered extractors.

An extractor is tested with its defaults and the first of `Field(examples=[...])` for fields without one, or with the
settings below where the defaults would need a network or much time.
"""

import itertools
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

import cbir.features  # noqa: F401 - registers the extractors
from cbir.spec import methods, one_of
from cbir.types import FeatureBatch, ImageBatch, Pixels

EXTRACTORS = {name: spec for name, spec in methods("extractor").items() if not spec.reads_vectors}
TINY = {"backbone": "test_resnet", "weights": "none", "size": 96}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sift": [{}, {"upright": True, "max_features": 20}],
    "local": [
        {"detector": {"name": detector}, "descriptor": {"name": descriptor}, **settings}
        for detector, descriptor, settings in (
            ("mser", "sift", {}),
            ("fast", "akaze", {"max_features": 50}),
            ("dense", "opponent_sift", {"max_features": 40, "upright": True}),
            ("fast_hessian", "surf", {}),
            ("dog", "sift", {"max_features": 30}),
        )
    ],
    "delf": [{**TINY, "scales": (0.5, 1.0), "max_features": 20}],
    "how": [{**TINY, "scales": (0.5, 1.0)}, {**TINY, "backbone": "test_vit", "scales": (1.0,), "max_features": 20}],
    "columns": [{**TINY, "layers": (-2,)}, {**TINY, "layers": (-2, -1), "max_features": 20}],
    "ensemble": [{"members": [TINY, {**TINY, "backbone": "test_efficientnet", "size": 64}], "member_weights": (2, 1)}],
    "multi_pass": [{"network": TINY}, {"network": TINY, "pool": "mean", "patches": {"name": "sliding_window"}}],
    "patches": [{"network": TINY}],
    "deep": [
        TINY,
        {**TINY, "scales": (0.7071, 1.0, 1.4142)},
        {**TINY, "scales": (0.5, 1.0), "fit": "longest", "pooling": {"name": "mac"}},
        {**TINY, "backbone": "test_vit", "pooling": {"name": "spoc"}},
        {**TINY, "layers": (-2, -1), "layer_weights": (1, 2), "scales": (0.7071, 1.0)},
        {**TINY, "fit": "longest", "flip": True, "pooling": {"name": "rmac"}},
    ],
    "roi": [
        {**TINY, "proposer": {"name": "grid", "levels": (1, 2)}},
        {**TINY, "proposer": {"name": "selective_search"}, "rows": "sum", "pooling": {"name": "mac"}, "parts": 2},
        {**TINY, "proposer": {"name": "mser", "whole": False}, "layers": (-3, -2, -1), "rows": "mean"},
    ],
}


def specs() -> list[Any]:
    params = []
    for name, cls in EXTRACTORS.items():
        required = {key: field.examples[0] for key, field in cls.model_fields.items() if field.is_required()}
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            params.append(pytest.param(cls(**{**required, **settings}), id=f"{name}-{number}"))
    return params


@pytest.fixture(scope="module", params=specs())
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def extractor(spec):
    return spec.build("cpu", {})


def picture(height: int, width: int, seed: int) -> Pixels:
    """Coloured boxes on noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 110, (height, width, 3), dtype=np.uint8)
    for _ in range(12):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        bottom, right = top + rng.integers(8, 60), left + rng.integers(8, 60)
        image[top:bottom, left:right] = rng.integers(0, 256, 3)
    image.flags.writeable = False
    return image


def batch(images: list[Pixels], first_id: int = 10**12) -> ImageBatch:
    sizes = np.array([(2 * image.shape[0], 2 * image.shape[1]) for image in images], np.int32).reshape(-1, 2)
    return ImageBatch(np.arange(first_id, first_id + len(images), dtype=np.int64), images, sizes)


PICTURES = [picture(96, 96, 0), picture(72, 96, 1), picture(96, 60, 2), picture(96, 96, 3), picture(72, 96, 4)]
GREY = np.full((96, 96, 3), 128, np.uint8)


def assert_same_bits(left: FeatureBatch, right: FeatureBatch) -> None:
    for name in ("image_ids", "offsets", "descriptors", "geometry"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


def test_features_are_as_declared(spec, extractor):
    features = extractor.extract(batch(PICTURES))
    assert np.array_equal(features.image_ids, batch(PICTURES).image_ids)
    assert features.descriptors.ndim == 2
    assert features.descriptors.flags.c_contiguous
    assert features.descriptors.dtype in (np.float32, np.uint8)
    assert np.isfinite(features.descriptors).all()
    assert (features.descriptors.any(axis=1)).all()
    assert features.geometry.dtype == np.float32
    assert features.geometry.flags.c_contiguous
    assert np.isfinite(features.geometry).all()
    if spec.local:
        assert features.geometry.shape[1] >= 4
        assert (features.counts > 0).all()
    elif spec.rows_are_regions:
        assert features.regions is not None
        assert np.array_equal(features.offsets, features.regions.offsets)
        assert features.geometry.shape[1] == 0
    else:
        assert (features.counts == 1).all()
        assert features.geometry.shape[1] == 0


def test_geometry_lies_within_the_original(spec, extractor):
    features = extractor.extract(batch(PICTURES))
    for i, (height, width) in enumerate(batch(PICTURES).sizes):
        geometry = features.geometry[features.rows(i)]
        if geometry.size:
            assert (geometry[:, :2] >= -1).all()
            assert (geometry[:, :2] <= (width, height)).all()
            assert (geometry[:, 2] > 0).all()


def test_no_images_give_no_features_of_the_same_kind(extractor):
    none, some = extractor.extract(batch([])), extractor.extract(batch(PICTURES))
    assert len(none) == 0
    assert none.descriptors.shape == (0, some.descriptors.shape[1])
    assert none.geometry.shape == (0, some.geometry.shape[1])
    assert none.descriptors.dtype == some.descriptors.dtype
    assert_same_bits(FeatureBatch.concatenate([none, some]), some)


def test_a_plain_grey_image_is_no_error(spec, extractor):
    features = extractor.extract(batch([GREY]))
    if spec.rows_are_regions:
        assert features.counts[0] == len(features.regions.boxes) >= 1
    else:
        assert features.counts[0] == (0 if spec.local else 1)
    assert np.isfinite(features.descriptors).all()
    assert features.descriptors.shape[1] == extractor.extract(batch(PICTURES[:1])).descriptors.shape[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (96, 2), (5, 7)])
def test_tiny_images_are_no_error(extractor, shape):
    features = extractor.extract(batch([np.full((*shape, 3), 77, np.uint8)]))
    assert np.isfinite(features.descriptors).all()


def test_features_do_not_depend_on_the_batch(extractor):
    images = [*PICTURES[:3], GREY, *PICTURES[3:]]
    whole = extractor.extract(batch(images))
    first_id = int(whole.image_ids[0])
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        cuts = np.cumsum([0, *sizes])
        parts = [extractor.extract(batch(images[a:b], first_id + a)) for a, b in itertools.pairwise(cuts)]
        assert_same_bits(FeatureBatch.concatenate(parts), whole)


def test_features_do_not_depend_on_the_order(extractor):
    whole = extractor.extract(batch(PICTURES))
    reverse = extractor.extract(batch(PICTURES[::-1]))
    turned = reverse.take(np.arange(len(PICTURES))[::-1])
    assert turned.descriptors.tobytes() == whole.descriptors.tobytes()
    assert turned.geometry.tobytes() == whole.geometry.tobytes()


def test_another_build_gives_the_same_bits(spec, extractor):
    assert_same_bits(spec.build("cpu", {}).extract(batch(PICTURES)), extractor.extract(batch(PICTURES)))


def test_images_are_not_changed(extractor):
    images = [picture(96, 96, 7), picture(72, 96, 8)]
    before = [image.copy() for image in images]
    extractor.extract(batch(images))
    assert all(np.array_equal(a, b) for a, b in zip(before, images, strict=True))


def test_the_spec_comes_back_from_json(spec):
    again = TypeAdapter(one_of("extractor")).validate_json(spec.model_dump_json())
    assert again == spec
    assert again.identity() == spec.identity()


def test_the_spec_tells_what_it_needs(spec):
    assert spec.view.size >= 1
    assert spec.batch_size >= 1
    assert spec.assets == {}
    assert spec.paper
    assert type(spec).__doc__
