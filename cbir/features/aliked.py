"""ALIKED: keypoints and descriptors of one small network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cbir.features.extractor import Extractor, ExtractorSpec
from cbir.features.weights import Sha256, file_or_none, is_file, local_path, present
from cbir.images import View

__all__ = ["Aliked"]


class Aliked(ExtractorSpec):
    """ALIKED (Zhao et al. 2023): the `max_features` local maxima of highest score above `threshold`, with unit vectors.

    Rows have 128 dimensions (64 for aliked-t16), float32. Geometry is x, y, a size of 32 decoded pixels (the network
    knows no scale; its coarsest maps have one place in so many) and angle 0. `weights` is the file of the `model`, or
    `none` for a random network drawn from `seed`. Images pass one by one through any device.
    """

    name: Literal["aliked"] = "aliked"
    local: ClassVar[bool] = True
    paper: ClassVar[str] = "Zhao et al., ALIKED: a lighter keypoint and descriptor extraction network, TIM 2023"

    model: Literal["aliked-t16", "aliked-n16", "aliked-n16rot", "aliked-n32"] = "aliked-n16"
    weights: str = Field(examples=["none"])
    """A file (local path, `file://` or `s3://`; .pth of tensors only, or .safetensors), or `none`."""
    weights_sha256: Sha256 | None = None
    seed: int = 0
    max_features: PositiveInt = 1000
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.2
    nms_radius: PositiveInt = 2
    """No two keypoints are nearer, in decoded pixels along both axes."""
    size: PositiveInt = 1024

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        file_or_none(self.weights, self._source)
        return self

    @property
    def _source(self) -> str:
        return f"https://github.com/Shiaoming/ALIKED/raw/main/models/{self.model}.pth"

    @property
    def view(self) -> View:
        """The longest side at most `size`, never enlarged."""
        return View(size=self.size, fit="longest")

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, where they are a file."""
        return {"weights": self.weights} if is_file(self.weights) else {}

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """The network on the device; weights that are a local path are found without `assets`.

        Raises ConfigError for weights that are missing, altered, unreadable or of another model.
        """
        from cbir.features.networks.aliked import AlikedExtractor

        path = local_path("weights", self.weights, assets)
        return AlikedExtractor(self, present(path, "extractor.weights", self._source), device)
