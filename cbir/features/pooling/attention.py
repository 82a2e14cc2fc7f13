"""Poolings that weigh places by attention: the length of their vector, or a trained score."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from cbir.errors import ConfigError
from cbir.features.pooling.pooling import Pooling, PoolingSpec, weighted_mean
from cbir.features.weights import is_file, local_path

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Attention", "WeightedSpoc"]

FIELD = "extractor.pooling.weights"


class Attention(PoolingSpec):
    """Attention-weighted mean of the places (Noh et al. 2017).

    `weights` is a file with the layers of DELF's attention, as for the extractor `delf`, or `norm` for the length of a
    place's vector. The file is a local path, `file://` or `s3://`, and must be of this backbone's last map.
    """

    name: Literal["attention"] = "attention"
    paper: ClassVar[str] = "Noh et al., Large-scale image retrieval with attentive deep local features, ICCV 2017"

    weights: str = "norm"

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        if self.weights != "norm" and not is_file(self.weights):
            raise ValueError(f"weights must be 'norm' or the path or s3:// URI of a file, found {self.weights!r}")
        return self

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, where they are a file."""
        return {"weights": self.weights} if is_file(self.weights) else {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Pooling:
        """The pooling with its layers on the device. ConfigError for weights that are missing or of another form."""
        path = local_path("weights", self.weights, assets)
        if path is None:
            return lambda maps: weighted_mean(maps, maps.norm(dim=1, keepdim=True))
        from cbir.features.networks.local_maps import TrainedAttention

        attention = TrainedAttention(path, FIELD).to(device)

        def pool(maps: "Tensor") -> "Tensor":
            if maps.shape[1] != attention.conv1.in_channels:
                raise ConfigError(
                    f"{FIELD}: an attention of {attention.conv1.in_channels} maps for {maps.shape[1]}; name the file "
                    "that was made for this backbone"
                )
            return weighted_mean(maps, attention(maps))

        return pool


class WeightedSpoc(PoolingSpec):
    """The global descriptor of HOW (Tolias et al. 2020): the mean of places averaged over 3 x 3, weighted by attention.

    The attention of a place is the l2 norm of its vector before averaging.
    """

    name: Literal["weighted_spoc"] = "weighted_spoc"
    paper: ClassVar[str] = "Tolias, Jenicek, Chum, Learning and aggregating deep local descriptors, ECCV 2020"

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        from torch.nn.functional import avg_pool2d

        return weighted_mean(avg_pool2d(maps, 3, 1, 1, count_include_pad=False), maps.norm(dim=1, keepdim=True))
