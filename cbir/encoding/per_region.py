"""Any aggregation, once per region of an image instead of once per image."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, GetJsonSchemaHandler, PlainValidator, SerializeAsAny
from pydantic_core import CoreSchema, PydanticKnownError

from cbir.encoding.encoder import Encoder, EncoderSpec
from cbir.spec import Method, methods
from cbir.types import Array, FeatureBatch, Floats, Int64s, Regions, State

__all__ = ["PerRegion", "PerRegionEncoder"]

BLOCK_IMAGES = 64
"""Images at a time: every feature is copied for each region that holds it."""


def _aggregator(data: Any) -> EncoderSpec:
    """The encoder of this name, which need not have been registered before this module."""
    found = data if isinstance(data, EncoderSpec) else _method_of(data).model_validate(data)
    if not isinstance(found, EncoderSpec) or isinstance(found, PerRegion) or not _gives_one_row(found):
        name = found.name
        raise ValueError(f"name: {name} does not make one row of local features; use an encoder such as vlad")
    return found


def _gives_one_row(spec: EncoderSpec) -> bool:
    return spec.aggregates and not spec.rows_are_regions and spec.output_rows(2) == 1


def _method_of(data: Any) -> type[Method]:
    """The encoder's class, or the errors of a union that is told apart by its name."""
    name, known = data.get("name") if isinstance(data, Mapping) else None, methods("encoder")
    if name is None:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
    if name not in known:
        tags = {"discriminator": "'name'", "tag": str(name), "expected_tags": ", ".join(known)}
        raise PydanticKnownError("union_tag_invalid", tags)
    return known[name]


class _AnAggregator:
    """The JSON schema of an encoder by its name, written when all are known."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = [name for name, spec in methods("encoder").items() if getattr(spec, "aggregates", False)]
        own = PerRegion.model_fields["name"].default
        name = {"type": "string", "enum": [name for name in names if name != own]}
        return {"type": "object", "properties": {"name": name}, "required": ["name"]}


if TYPE_CHECKING:
    Aggregator = EncoderSpec
else:
    Aggregator = Annotated[SerializeAsAny[EncoderSpec], PlainValidator(_aggregator), _AnAggregator()]


class PerRegion(EncoderSpec):
    """Regional search (Teichmann et al. 2019): an aggregating encoder is applied to the features in each region.

    With `similarity: max`, every region becomes a row, and the best of them ranks the image in a dense index: sim(q, n)
    = max_r q . V(n, r). With `mean`, an image has one row, the mean of its regions', so that by inner product sim(q, n)
    = mean_r q . V(n, r) (their equation 4) at the price of one vector per image; with `vlad` that is R-VLAD, and no
    unit vector should be made of it. Images without regions, as queries are, have one row of all their features. The
    encoder is trained on whole images, in which no feature counts twice.
    """

    name: Literal["per_region"] = "per_region"
    paper: ClassVar[str] = "Teichmann et al., Detect-to-Retrieve: efficient regional aggregation, CVPR 2019"

    aggregates: ClassVar[bool] = True
    needs_regions: ClassVar[bool] = True

    encoder: Aggregator = Field(examples=[{"name": "vlad"}], description="the aggregating encoder, such as vlad")
    similarity: Literal["max", "mean"] = Field(
        default="max", description="max: a row per region, of which the best counts; mean: their mean as one row"
    )

    @property
    def trained(self) -> bool:
        """If its encoder is."""
        return self.encoder.trained

    def identity(self) -> dict[str, Any]:
        """With the encoder's own version."""
        return {**super().identity(), "encoder": self.encoder.identity()}

    def output_dim(self, dim: int) -> int:
        """That of its encoder."""
        return self.encoder.output_dim(dim)

    @property
    def rows_are_regions(self) -> bool:
        """Unless it is their mean."""
        return self.similarity == "max"

    def fit(self, sample: FeatureBatch, seed: int) -> "PerRegionEncoder":
        """Train the encoder on the whole images of the sample."""
        return PerRegionEncoder(self, self.encoder.fit(replace(sample, regions=None), seed))

    def restore(self, state: State) -> "PerRegionEncoder":
        """From the encoder's state."""
        return PerRegionEncoder(self, self.encoder.restore(state))


class PerRegionEncoder:
    """A trained encoder that sees every region as an image."""

    def __init__(self, spec: PerRegion, encoder: Encoder) -> None:
        self._spec, self._encoder = spec, encoder

    def encode(self, batch: FeatureBatch) -> FeatureBatch:
        """K rows in M regions of N images -> M rows (M, D') with the regions; (N, D') for the mean or without any."""
        if batch.regions is None or not len(batch):
            return self._encoder.encode(replace(batch, regions=None))
        parts = [self._encoded(block) for block in _blocks(batch)]
        return FeatureBatch.concatenate(parts)

    def _encoded(self, batch: FeatureBatch) -> FeatureBatch:
        boxes = [_boxes(batch, i) for i in range(len(batch))]
        rows = self._encoder.encode(_regions_as_images(batch)).descriptors
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(some) for some in boxes])])
        if self._spec.similarity == "mean":
            return FeatureBatch.of_global(batch.image_ids, _means(rows, offsets))
        regions = Regions(offsets, np.concatenate(boxes))
        return FeatureBatch(batch.image_ids, offsets, rows, sizes=batch.sizes, regions=regions)

    def state(self) -> State:
        """That of the encoder."""
        return self._encoder.state()


def _blocks(batch: FeatureBatch) -> Iterator[FeatureBatch]:
    for start in range(0, len(batch), BLOCK_IMAGES):
        yield batch.take(np.arange(start, min(start + BLOCK_IMAGES, len(batch))))


def _boxes(batch: FeatureBatch, i: int) -> Floats:
    """The regions of image number i, the whole image where it has none."""
    boxes = batch.regions.of(i) if batch.regions is not None else np.empty((0, 4), np.float32)
    height, width = batch.sizes[i]
    return boxes if len(boxes) else np.array([[0, 0, width, height]], np.float32)


def _regions_as_images(batch: FeatureBatch) -> FeatureBatch:
    """A batch with the features of every region as those of an image of its own."""
    inside = [batch.members(i) for i in range(len(batch))]
    rows = np.concatenate([np.nonzero(some)[1] + start for some, start in zip(inside, batch.offsets[:-1], strict=True)])
    counts = np.concatenate([some.sum(axis=1) for some in inside])
    owners = np.repeat(np.arange(len(batch)), [len(some) for some in inside])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    own = batch.image_ids[owners], offsets, batch.descriptors[rows], batch.geometry[rows], batch.sizes[owners]
    return FeatureBatch(*own)


def _means(rows: Array, offsets: Int64s) -> Floats:
    """The mean row of every image, in float64 and image by image."""
    means = np.empty((len(offsets) - 1, rows.shape[1]), np.float32)
    for i in range(len(means)):
        some = rows[offsets[i] : offsets[i + 1]]
        means[i] = np.add.reduce(some, axis=0, dtype=np.float64) / len(some)
    return means
