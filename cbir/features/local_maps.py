"""What DELF, HOW and columns share: local features that are places of a network's map, seen at several scales."""

from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from cbir.features.backbone import BackboneSpec, Layers
from cbir.images import View

__all__ = ["LocalMapsSpec", "StageSpec"]


class LocalMapsSpec(BackboneSpec):
    """Configuration of an extractor whose keypoints are the places of a map; needs no torch.

    Geometry is the centre of a place's receptive field, its size (that of the convolutions and maximum poolings; of a
    transformer, its patch) and angle 0. Of all scales together the `max_features` places of highest score are kept.
    """

    local: ClassVar[bool] = True
    layers_key: ClassVar[str] = "layers"
    """The field that chooses the maps."""

    weights: str = Field(examples=["none"])
    """A file (local path, `file://` or `s3://`), `hub` or a tag of timm's, or `none` for a random network."""
    size: PositiveInt = 1024
    """Longest side at scale 1; smaller pictures are not enlarged at that scale."""
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.25, 0.3536, 0.5, 0.7071, 1.0, 1.4142, 2.0)
    max_features: PositiveInt = 1000

    @property
    def map_layers(self) -> Layers:
        """Where the maps are taken from."""
        raise NotImplementedError

    @property
    def view(self) -> View:
        """The size of the largest scale; smaller ones are made from it."""
        return View(size=round(self.size * max(self.scales)), fit="longest", oversampling=2)

    def least_score(self, largest: float) -> float:
        """The score that a place must exceed, in an image whose largest is given; at least 0."""
        raise NotImplementedError


class StageSpec(LocalMapsSpec):
    """Configuration of an extractor that looks at one of timm's numbered maps."""

    layers_key: ClassVar[str] = "stage"

    stage: int = -2
    """Which of timm's maps, from the last (-1) back; -2 is conv4_x of a ResNet."""

    @property
    def map_layers(self) -> Layers:
        """The stage."""
        return (self.stage,)
