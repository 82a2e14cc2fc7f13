"""HOW: places of a network's map, chosen by the length of their vector and smoothed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cbir.features.extractor import Extractor
from cbir.features.local_maps import StageSpec
from cbir.features.weights import local_path

__all__ = ["How"]


class How(StageSpec):
    """HOW (Tolias et al. 2020): places of a map, averaged over 3 x 3, float32, by falling l2 norm before averaging.

    The rows are neither centred nor normalised: HOW whitens them (`pca` with 128 dimensions and `whiten`) and matches
    them with ASMK*. The mask is the norm as a part of the image's largest; places at or below `least_attention` are
    left out. The global descriptor of the same network is `deep` with the pooling `weighted_spoc`.
    """

    name: Literal["how"] = "how"
    paper: ClassVar[str] = "Tolias, Jenicek, Chum, Learning and aggregating deep local descriptors, ECCV 2020"

    least_attention: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def least_score(self, largest: float) -> float:
        """Its part of the largest."""
        return self.least_attention * largest

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """The network on the device; weights that are a local path are found without `assets`.

        Raises ConfigError for weights that are missing, unreadable or of another network.
        """
        from cbir.features.networks.local_maps import LocalMapsExtractor, how

        return LocalMapsExtractor(self, local_path("weights", self.weights, assets), device, how)
