"""PCA of local features: the encoders `rootsift` and `pca` after an extractor, against scikit-learn's."""

import numpy as np
import pytest

from cbir.config import Channel
from cbir.types import FeatureBatch, ImageBatch
from tests.features.scenes import scene


def test_pca_of_rootsift_is_that_of_scikit_learn_up_to_sign():
    decomposition = pytest.importorskip("sklearn.decomposition")
    channel = Channel.model_validate(
        {
            "extractor": {"name": "sift", "max_features": 300},
            "encoders": [{"name": "rootsift"}, {"name": "pca", "dim": 64, "l2": False}, {"name": "vlad", "words": 4}],
            "index": {"name": "flat"},
        }
    )
    images = [scene(seed=seed) for seed in range(3)]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    batch = channel.extractor.build("cpu", {}).extract(ImageBatch(np.arange(3), images, sizes))
    rootsift, pca = (encoder for encoder in channel.encoders[:2])
    rows = rootsift.fit(batch, 0).encode(batch)
    reduced: FeatureBatch = pca.fit(rows, 0).encode(rows)
    expected = decomposition.PCA(64, svd_solver="full").fit_transform(rows.descriptors.astype(np.float64))
    signs = np.sign((expected * reduced.descriptors).sum(axis=0))
    assert reduced.descriptors.shape == (len(batch.descriptors), 64)
    assert len(reduced.descriptors) > 200
    assert np.allclose(reduced.descriptors, expected * signs, atol=1e-4)
    assert np.array_equal(reduced.offsets, batch.offsets)
    assert np.array_equal(reduced.geometry, batch.geometry)
