"""NetVLAD as a pooling; the part that needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cbir.features.pooling.pooling import Pooling, PoolingSpec
from cbir.features.weights import file_or_none, local_path

__all__ = ["NetVlad"]


class NetVlad(PoolingSpec):
    """NetVLAD (Arandjelović et al. 2016): residuals of places to words, softly assigned; W * C numbers.

    `weights` is a file (local path, `file://` or `s3://`; .safetensors, or .pth of tensors only) with `centroids`
    (W, C), `conv.weight` (W, C, 1, 1) and, unless it was initialised without, `conv.bias` (W,): the state of the layer
    in `cbir.features.networks.netvlad`. With `none`, words are drawn from `seed`, which serves tests. Reduce the
    result with `pca`.
    """

    weighs_places: ClassVar[bool] = False
    name: Literal["netvlad"] = "netvlad"
    paper: ClassVar[str] = "Arandjelović et al., NetVLAD: CNN architecture for weakly supervised recognition, CVPR 2016"

    weights: str = Field(examples=["none"])
    words: PositiveInt = 64
    """W, as many as the file holds."""
    seed: int = 0
    """Of random words."""

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        file_or_none(self.weights, "centroids and conv of a NetVLAD layer for this backbone")
        return self

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, unless they are random."""
        return {} if self.weights == "none" else {"weights": self.weights}

    def build(self, device: str, assets: Mapping[str, Path]) -> Pooling:
        """The layer on the device. ConfigError for weights that are missing, unreadable or of another form.

        That their words have as many numbers as there are maps is found at the first maps.
        """
        from cbir.features.networks.netvlad import loaded, random_words

        path = local_path("weights", self.weights, assets)
        return random_words(self.words, self.seed, device) if path is None else loaded(path, self.words).to(device)
