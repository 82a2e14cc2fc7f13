"""Columns: every place of a network's maps as a local feature."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from cbir.features.backbone import Layers
from cbir.features.extractor import Extractor
from cbir.features.local_maps import LocalMapsSpec
from cbir.features.weights import local_path

__all__ = ["Columns"]


class Columns(LocalMapsSpec):
    """Columns of convolutional maps (Ng et al. 2015): every place is a local feature, for `vlad`, `fisher`, `bow`.

    A place of one layer is its vector as it is; zero vectors are left out. A place of several `layers` is a hypercolumn
    (Hariharan et al. 2015): the unit vectors of all layers side by side, as long as that of the first, on whose grid
    they lie; the maps of the others are resized to it. Geometry is that of the first layer. Of all scales together, the
    `max_features` places of largest l2 norm are kept.
    """

    name: Literal["columns"] = "columns"
    paper: ClassVar[str] = "Ng, Yang, Davis, Exploiting local features from deep networks for image retrieval, 2015"

    layers: Layers = ()
    """Which maps, by timm's numbers or by the names of modules; the last map if none is given."""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    max_features: PositiveInt = 100_000

    @property
    def map_layers(self) -> Layers:
        """Those that are given."""
        return self.layers

    def least_score(self, largest: float) -> float:  # noqa: ARG002 - every place has its column
        """0."""
        return 0.0

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """The network on the device; weights that are a local path are found without `assets`.

        Raises ConfigError for weights that are missing, unreadable or of another network.
        """
        from cbir.features.networks.local_maps import LocalMapsExtractor, columns

        return LocalMapsExtractor(self, local_path("weights", self.weights, assets), device, columns)
