"""Descriptors of regions: a network runs once over an image, and its maps are pooled in every proposed box."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

import cbir.features.regions  # noqa: F401 - registers the proposers that the field below chooses from
from cbir.errors import ConfigError
from cbir.features.backbone import BackboneSpec, Layers
from cbir.features.extractor import Extractor
from cbir.features.pooling import GeM, PoolingSpec
from cbir.features.regions.grid import Grid
from cbir.features.regions.proposer import Proposer, ProposerSpec
from cbir.features.weights import files_of, identity_without_files, is_file, local_path
from cbir.images import View
from cbir.spec import one_of

if TYPE_CHECKING:
    AnyPooling = PoolingSpec
    AnyProposer = ProposerSpec
else:
    AnyPooling, AnyProposer = one_of("pooling"), one_of("proposer")

__all__ = ["Roi", "pyramid_level"]

WHOLE = Grid(levels=(1,))
"""Proposes the whole image and nothing else."""


class Roi(BackboneSpec):
    """Regions of interest (Girshick 2015): maps of a network, pooled in the boxes of a proposer, l2-normalised float32.

    A box is divided into `grid` x `grid` cells, each the mean of bilinear samples (RoIAlign, He et al. 2017), over
    which `pooling` works; the whole image is always the first box. Backbone, weights and colours are those of `deep`.
    Images keep their aspect ratio and are not enlarged.

    With `rows: each`, every box becomes a row with its region, and the best of them ranks the image in a dense index:
    sim(q, n) = max_r q . V(n, r). With `mean`, an image has the mean of its rows, so that by inner product sim(q, n) =
    mean_r q . V(n, r) (Teichmann et al. 2019, equation 4), of which no unit vector should be made. With `sum`, it has
    their normalised sum, which with learned boxes and `mac` is the R-MAC of Gordo et al. (2016).

    Queries are one row of the whole picture, or of the box in it that is asked for, at most `query_size` pixels long:
    networks tell an object by its size in pixels too, and one in a region is smaller than one that fills a picture.
    Only for `sum` are queries aggregated as indexed images are, at their size.

    Several `layers`, from fine to coarse, go through a feature pyramid (Lin et al. 2017): a box of w x h pixels of the
    network's input is pooled in the map of stride 2^k, k = floor(4 + log2(sqrt(w h) / 224)), or the nearest that there
    is. Boxes on different maps can be compared only with a trained `pyramid`.

    With `parts` above 1, a box is divided into as many parts on each side, whose pooled values are concatenated, so
    that the descriptor keeps their layout. `position_sensitive` (R-FCN, Dai et al. 2016) lets each of the n = parts^2
    see its own maps only: part i, row by row, the maps i, n + i, 2 n + i, ... of a network that was trained so.
    """

    name: Literal["roi"] = "roi"
    paper: ClassVar[str] = "Girshick, Fast R-CNN, ICCV 2015"

    layers: Layers = Field(default=(), description="maps of the network, from fine to coarse; its last if not given")
    pyramid: str = Field(
        default="none", description="file with the weights of torchvision's FeaturePyramidNetwork, or none (random)"
    )
    pyramid_channels: PositiveInt = Field(default=256, description="D of a pyramid's maps")
    size: PositiveInt = Field(default=512, description="the longest side of an image in pixels, never enlarged")
    query_size: PositiveInt | None = Field(default=None, description="the same of a query; half if not given")
    proposer: AnyProposer = Field(examples=[{"name": "grid"}], description="where objects may be")
    grid: PositiveInt = Field(default=7, description="cells on a side of a box, or of each of its parts")
    parts: PositiveInt = Field(default=1, description="parts on a side of a box that are described one by one")
    position_sensitive: bool = Field(default=False, description="each part sees its own share of the maps")
    pooling: AnyPooling = Field(default=GeM(), description="from the cells to one value per map")
    rows: Literal["each", "mean", "sum"] = Field(default="each", description="what becomes of an image's regions")

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.position_sensitive and self.parts == 1:
            raise ValueError("position_sensitive: needs parts above 1 on a side, as in parts: 3")
        if self.pyramid != "none" and not is_file(self.pyramid):
            raise ValueError(f"pyramid must be 'none' or the path or s3:// URI of a file, found {self.pyramid!r}")
        if self.pyramid != "none" and len(self.layers) < 2:
            raise ValueError("pyramid: needs several layers, as in layers: [-4, -3, -2, -1]")
        return self

    @property
    def rows_are_regions(self) -> bool:
        """Unless they become one."""
        return self.rows == "each"

    @property
    def view(self) -> View:
        """The longest side at most `size`, never enlarged."""
        return View(size=self.size, fit="longest", oversampling=2)

    @property
    def assets(self) -> Mapping[str, str]:
        """Weights of backbone and pyramid, where they are files; `pooling.<field>` and `proposer.<field>` of these."""
        own = {} if self.pyramid == "none" else {"pyramid": self.pyramid}
        parts = (("pooling", self.pooling), ("proposer", self.proposer))
        of_parts = {f"{part}.{field}": uri for part, method in parts for field, uri in method.assets.items()}
        return {**super().assets, **own, **of_parts}

    @property
    def for_queries(self) -> Self:
        """With the whole image as the only region, at the size of queries, unless both sides are sums."""
        if self.rows == "sum":
            return self
        return self.model_copy(update={"proposer": WHOLE, "size": self.query_size or max(1, self.size // 2)})

    def identity(self) -> dict[str, Any]:
        """With the versions of proposer and pooling, whose files enter by their content, not by their path; without
        the size of queries, which changes no stored row."""
        parts = (("pooling", self.pooling), ("proposer", self.proposer))
        made_of = {part: identity_without_files(method, method.assets) for part, method in parts}
        return {field: value for field, value in super().identity().items() if field != "query_size"} | made_of

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """Network and proposer on the device; files that are local paths are found without `assets`.

        Raises ConfigError for weights that are missing, unreadable or of another network, and for layers that do not
        make a pyramid.
        """
        from cbir.features.networks.roi import Maps, RoiExtractor

        weights, pyramid = (local_path(field, getattr(self, field), assets) for field in ("weights", "pyramid"))
        maps = Maps(self, weights, pyramid, device)
        pooling = self.pooling.build(device, files_of("pooling", assets))
        return RoiExtractor(self, maps, self._build_proposer(device, assets), pooling)

    def _build_proposer(self, device: str, assets: Mapping[str, Path]) -> Proposer:
        try:
            return self.proposer.build(device, files_of("proposer", assets))
        except ConfigError as error:
            raise ConfigError(f"extractor.{error}") from error


def pyramid_level(width: float, height: float, strides: Sequence[int]) -> int:
    """The number of the map, of those with these rising strides, for a box of so many pixels (Lin et al. 2017).

    Its stride is 2^floor(4 + log2(sqrt(width height) / 224)) or the nearest below, of small boxes the first.
    """
    # 14 = 224 / 2^4. No logarithm, whose rounding would decide at the edge of a level.
    return max(0, sum(width * height >= (14 * stride) ** 2 for stride in strides) - 1)
