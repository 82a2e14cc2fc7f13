"""DELF: places of a network's map, chosen by learned attention."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import NonNegativeFloat, model_validator

from cbir.features.extractor import Extractor
from cbir.features.local_maps import StageSpec
from cbir.features.weights import is_file, local_path

__all__ = ["Delf"]

TRAINED_THRESHOLD = 100.0


class Delf(StageSpec):
    """DELF (Noh et al. 2017): l2-normalised places of a map, float32, by falling attention; reduce them with `pca`.

    `attention` is a file with the attention's two layers, 1 x 1 convolutions with a ReLU between and a softplus after
    them (`conv1.weight` (A, C, 1, 1), `conv1.bias`, `conv2.weight` (1, A, 1, 1), `conv2.bias`), or `norm` for the
    length of a place's vector. Places with a score of `score_threshold` or less are left out: 100 unless given, as
    published for the trained attention, and 0 for `norm`. Overlapping places are all kept, as in Detect-to-Retrieve.
    """

    name: Literal["delf"] = "delf"
    paper: ClassVar[str] = "Noh et al., Large-scale image retrieval with attentive deep local features, ICCV 2017"

    attention: str = "norm"
    score_threshold: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _attention_is_known(self) -> Self:
        if self.attention != "norm" and not is_file(self.attention):
            raise ValueError(f"attention must be 'norm' or the path or s3:// URI of a file, found {self.attention!r}")
        return self

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights and the attention, where they are files."""
        return {**super().assets, **({"attention": self.attention} if is_file(self.attention) else {})}

    def least_score(self, largest: float) -> float:  # noqa: ARG002 - an absolute threshold
        """The threshold."""
        if self.score_threshold is None:
            return TRAINED_THRESHOLD if is_file(self.attention) else 0.0
        return self.score_threshold

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """The network and its attention on the device; files that are local paths are found without `assets`.

        Raises ConfigError for weights that are missing, unreadable or of another network.
        """
        from cbir.features.networks.local_maps import LocalMapsExtractor, TrainedAttention, delf

        weights = local_path("weights", self.weights, assets)
        attention = local_path("attention", self.attention, assets)
        return LocalMapsExtractor(self, weights, device, delf(TrainedAttention(attention) if attention else None))
