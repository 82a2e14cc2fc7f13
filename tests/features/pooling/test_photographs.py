"""Poolings of a trained network on real photographs: views of a place are found among those of other places.

Images pass through the network once; all poolings work on the same maps.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.cluster.vq import kmeans2
from torch.nn.functional import normalize

from cbir.evaluation.ground_truth import read_ground_truth
from cbir.evaluation.metrics import evaluate
from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.netvlad import initialised
from cbir.features.pooling import Pooling
from cbir.features.pooling.netvlad import NetVlad
from cbir.spec import methods

MEAN_PRECISION = {
    "attention": 0.762,
    "blockwise_max": 0.747,
    "crow": 0.764,
    "gem": 0.773,
    "interactive": 0.763,
    "mac": 0.764,
    "parts": 0.773,
    "rmac": 0.775,
    "spoc": 0.767,
    "weighted_spoc": 0.762,
}
"""Measured with the defaults."""

RANDOM_WORDS, TRAINED_WORDS = 0.725, 0.774


class Places:
    """Maps of all images of a set, and what is to be found."""

    def __init__(self, data: Path, name: str) -> None:
        weights = data / "weights" / "mobilenetv2_100_imagenet.safetensors"
        fields = {"backbone_args": {"pad_type": "same"}, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        self._backbone = Backbone(Deep(backbone="mobilenetv2_100", weights=str(weights), **fields), weights)
        self._truth = read_ground_truth(data / "photos" / name / "ground_truth.csv")
        self._keys = sorted({key for query in self._truth.queries for key in (query.image, *query.positives)})
        self.maps = torch.cat([self._maps(data / "photos" / name / key) for key in self._keys])

    def _maps(self, path: Path) -> torch.Tensor:
        with Image.open(path) as image, torch.inference_mode():
            pixels = np.array(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
            return self._backbone(torch.from_numpy(pixels[None]))

    def mean_precision(self, pool: Pooling) -> float:
        """mAP of the ranking by cosine of the maps that are pooled so."""
        with torch.inference_mode():
            rows = normalize(pool(self.maps)).numpy()
        queries = [self._keys.index(query.image) for query in self._truth.queries]
        rankings = [[self._keys[i] for i in order] for order in np.argsort(-rows[queries] @ rows.T, kind="stable")]
        return evaluate(rankings, self._truth).mean_average_precision()


@pytest.fixture(scope="module")
def photographed(test_data: Path) -> Places:
    return Places(test_data, "koe_places")


@pytest.mark.parametrize("name", list(MEAN_PRECISION))
def test_views_of_a_place_are_found(photographed: Places, name: str) -> None:
    found = photographed.mean_precision(methods("pooling")[name]().build("cpu", {}))
    assert found == pytest.approx(MEAN_PRECISION[name], abs=0.01)


@pytest.mark.parametrize("form", ["vlad", "vladv2"])
def test_netvlad_needs_words_of_such_places(photographed: Places, form: str) -> None:
    sample = normalize(photographed.maps).permute(0, 2, 3, 1).flatten(0, 2)[::7]
    words, _ = kmeans2(sample.numpy(), 16, minit="++", seed=0)
    trained = photographed.mean_precision(initialised(torch.from_numpy(words), sample, form))
    drawn = photographed.mean_precision(NetVlad(weights="none", words=16).build("cpu", {}))
    assert trained == pytest.approx(TRAINED_WORDS, abs=0.01)
    assert drawn == pytest.approx(RANDOM_WORDS, abs=0.01)
