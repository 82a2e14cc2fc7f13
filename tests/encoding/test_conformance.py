"""What every encoder owes: the role's specification, run on all registered encoders.

An encoder is tested with its defaults; a field without a default needs `Field(examples=[...])`, whose first value is
taken here and shown to users by the schema. A file that it needs is an entry of FILES.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load, save

import cbir.encoding  # noqa: F401 - registers the encoders
from cbir.errors import DataError
from cbir.spec import methods, one_of
from cbir.types import FeatureBatch, image_id

ENCODERS = methods("encoder")
DIM, SEED = 128, 7

FILES = {"pairs.csv": "query,positive\n" + "".join(f"image{i},image{i + 1}\n" for i in range(800))}
"""The content of the files that examples name."""

SAMPLE_IMAGES = {"learned_whitening": 700}
"""Where 40 images are too few to train on."""


def spec_of(name: str) -> Any:
    fields = ENCODERS[name].model_fields
    return ENCODERS[name](**{key: field.examples[0] for key, field in fields.items() if field.is_required()})


def with_files(spec: Any, folder: Path) -> Any:
    """The encoder with what its examples name as files of the folder."""
    for name in spec.assets.values():
        (folder / name).write_text(FILES[name])
    return spec.with_assets({field: folder / name for field, name in spec.assets.items()})


def features(num_images: int, seed: int, dtype: str) -> FeatureBatch:
    """Histogram-like local features, every fifth image without any, with a zero row and repeated rows."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 25, num_images) * (np.arange(num_images) % 5 != 3)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = rng.gamma(0.5, 30.0, (offsets[-1], DIM)).clip(0, 255).astype(dtype)
    if len(rows) > 3:
        rows[1], rows[2] = 0, rows[0]
    geometry = rng.random((len(rows), 4), dtype=np.float32)
    ids = np.array([image_id(f"image{number}") for number in range(num_images)], np.int64)
    return FeatureBatch(rng.permutation(ids), offsets, rows, geometry)


def sample_of(spec: Any, dtype: str) -> FeatureBatch:
    """What the encoder is trained on."""
    return inputs(spec, features(SAMPLE_IMAGES.get(spec.name, 40), 1, dtype), dtype)


def inputs(spec: Any, batch: FeatureBatch, dtype: str) -> FeatureBatch:
    """The features themselves, or what the encoder that has to stand before this one makes of them."""
    return batch if spec.precursor is None else trained(spec.precursor, dtype).encode(batch)


@functools.cache
def trained(spec: Any, dtype: str) -> Any:
    return spec.fit(sample_of(spec, dtype), SEED)


def freeze(batch: FeatureBatch) -> FeatureBatch:
    for array in (batch.image_ids, batch.offsets, batch.descriptors, batch.geometry):
        array.flags.writeable = False
    return batch


def assert_same_bits(left: FeatureBatch, right: FeatureBatch) -> None:
    for name in ("image_ids", "offsets", "descriptors", "geometry"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


@pytest.fixture(scope="module", params=list(ENCODERS))
def spec(request, tmp_path_factory):
    return with_files(spec_of(request.param), tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", params=["float32", "uint8"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(spec, dtype):
    return spec.fit(freeze(sample_of(spec, dtype)), SEED)


@pytest.fixture
def batch(spec, dtype):
    return freeze(inputs(spec, features(30, 2, dtype), dtype))


def test_the_output_is_finite_float32_of_the_same_images(spec, encoder, batch):
    encoded = encoder.encode(batch)
    assert encoded.descriptors.dtype == np.float32
    assert encoded.descriptors.ndim == 2
    assert encoded.descriptors.flags.c_contiguous
    assert np.isfinite(encoded.descriptors).all()
    np.testing.assert_array_equal(encoded.image_ids, batch.image_ids)
    assert spec.output_dim(batch.descriptors.shape[1]) == encoded.descriptors.shape[1]
    most = [spec.output_rows(int(rows)) for rows in batch.counts]
    if spec.drops_rows:
        assert (encoded.counts <= most).all()
        assert encoded.geometry.shape[1] == batch.geometry.shape[1]
        return
    assert encoded.counts.tolist() == most
    if spec.aggregates or spec.precursor is not None:
        assert encoded.geometry.shape[1] == 0
    else:
        np.testing.assert_array_equal(encoded.offsets, batch.offsets)
        np.testing.assert_array_equal(encoded.geometry, batch.geometry)


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_may_be_cut_anywhere(encoder, batch, seed):
    rng = np.random.default_rng(seed)
    cuts = np.unique([0, *rng.integers(0, len(batch), 1 + 3 * seed), len(batch)])
    parts = [batch.take(np.arange(a, b)) for a, b in itertools.pairwise(cuts)]
    assert_same_bits(FeatureBatch.concatenate([encoder.encode(part) for part in parts]), encoder.encode(batch))


def test_an_image_does_not_depend_on_its_neighbours(spec, encoder, batch, dtype):
    shuffled = np.random.default_rng(5).permutation(len(batch))
    assert_same_bits(encoder.encode(batch.take(shuffled)), encoder.encode(batch).take(shuffled))
    crowded = FeatureBatch.concatenate([inputs(spec, features(50, 3, dtype), dtype), batch])
    assert_same_bits(encoder.encode(crowded).take(np.arange(50, len(crowded))), encoder.encode(batch))


def test_one_image(encoder, batch):
    assert_same_bits(encoder.encode(batch.take(np.array([4]))), encoder.encode(batch).take(np.array([4])))


def test_no_images(encoder, batch):
    encoded, full = encoder.encode(batch.take(np.arange(0))), encoder.encode(batch)
    assert len(encoded) == 0
    assert encoded.descriptors.shape == (0, full.descriptors.shape[1])
    assert encoded.descriptors.dtype == np.float32


def test_images_without_features(spec, encoder, dtype):
    batch = features(30, 2, dtype)
    empty = batch.take(np.flatnonzero(batch.counts == 0))
    assert len(empty) > 1
    assert len(empty.descriptors) == 0
    given = inputs(spec, empty, dtype)
    encoded = encoder.encode(given)
    np.testing.assert_array_equal(encoded.image_ids, empty.image_ids)
    assert encoded.counts.tolist() == [spec.output_rows(int(rows)) for rows in given.counts]
    assert not encoded.descriptors.any()


def test_a_zero_row_stays_finite(encoder, batch):
    zeros = batch.with_descriptors(np.zeros_like(batch.descriptors))
    assert np.isfinite(encoder.encode(zeros).descriptors).all()


def test_the_same_sample_and_seed_give_the_same_bytes(spec, encoder, batch, dtype):
    again = spec.fit(sample_of(spec, dtype), SEED)
    assert save(dict(again.state())) == save(dict(encoder.state()))
    assert_same_bits(again.encode(batch), encoder.encode(batch))


def test_the_state_is_named_contiguous_arrays(encoder):
    for name, array in encoder.state().items():
        assert isinstance(name, str)
        assert array.flags.c_contiguous, f"{name}: safetensors would store the memory of another layout"


def test_the_state_restores_the_encoder(spec, encoder, batch):
    stored = save(dict(encoder.state()))
    restored = spec.restore(load(stored))
    assert save(dict(restored.state())) == stored
    assert_same_bits(restored.encode(batch), encoder.encode(batch))


def test_the_spec_survives_json(spec):
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
    assert TypeAdapter(one_of("encoder")).validate_json(spec.model_dump_json()) == spec


def test_the_method_is_documented(spec):
    assert type(spec).__doc__
    assert type(spec).paper


def test_a_sample_that_is_too_small_is_refused_if_one_is_needed(spec, dtype):
    given = sample_of(spec, dtype)
    for sample in (given.take(np.arange(0)), given.take(np.array([0]))):
        sample = FeatureBatch.of_global(sample.image_ids, sample.descriptors[: len(sample)])
        if spec.trained:
            with pytest.raises(DataError, match="sample"):
                spec.fit(sample, SEED)
        else:
            spec.fit(sample, SEED)


def test_features_of_another_extractor_are_refused_if_it_was_trained(spec, encoder):
    for num_rows in (0, 3):
        other = FeatureBatch.of_global(np.arange(num_rows), np.ones((num_rows, DIM // 2), np.float32))
        if spec.trained:
            with pytest.raises(DataError, match="D = 64"):
                encoder.encode(other)
        else:
            assert encoder.encode(other).descriptors.shape == (num_rows, DIM // 2)
