"""Several networks as one extractor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from cbir.features.backbone import errors_of
from cbir.features.blocks import one_weight_each, side_by_side
from cbir.features.deep import Deep
from cbir.features.extractor import Extractor, ExtractorSpec
from cbir.features.weights import files_of, identity_without_files
from cbir.images import View
from cbir.types import FeatureBatch, ImageBatch

__all__ = ["Ensemble"]


class Ensemble(ExtractorSpec):
    """Fusion of models (Simonyan and Zisserman 2015): the descriptors of several networks side by side, unit float32.

    Every member is a `deep`, with its own backbone, weights, layers and pooling. An inner product is the mean of the
    members' cosines, weighted by the squares of `member_weights`. Pictures are decoded once, at the size of the largest
    member, from which the others scale them.
    """

    name: Literal["ensemble"] = "ensemble"
    paper: ClassVar[str] = "Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition"

    members: tuple[Deep, ...] = Field(
        min_length=1, examples=[[{"backbone": "resnet50"}, {"backbone": "vgg16", "layers": ["fc6"]}]]
    )
    member_weights: tuple[PositiveFloat, ...] = Field(default=(), description="one for each member; equal if not given")

    @model_validator(mode="after")
    def _members_fit_together(self) -> Self:
        one_weight_each(self.member_weights, len(self.members), "members")
        if len({member.fit for member in self.members}) > 1:
            raise ValueError("members: all must have the same fit, stretch or longest, as pictures are decoded once")
        return self

    @property
    def for_queries(self) -> Self:
        """Of members for queries."""
        return self.model_copy(update={"members": tuple(member.for_queries for member in self.members)})

    @property
    def view(self) -> View:
        """That of the largest member."""
        return max((member.view for member in self.members), key=lambda view: view.size)

    @property
    def batch_size(self) -> int:
        """As many as the member that wants most."""
        return max(member.batch_size for member in self.members)

    @property
    def assets(self) -> Mapping[str, str]:
        """Those of all members, as `members.<number>.<field>`."""
        return {
            f"members.{number}.{field}": uri
            for number, member in enumerate(self.members)
            for field, uri in member.assets.items()
        }

    def identity(self) -> dict[str, Any]:
        """Fields and versions of all members; their files enter by their content, not by their path."""
        members = [identity_without_files(member, member.assets) for member in self.members]
        return {**super().identity(), "members": members}

    def build(self, device: str, assets: Mapping[str, Path]) -> Extractor:
        """All networks on the device; ConfigError, with the member's number, for one that cannot be built."""
        members = []
        for number, member in enumerate(self.members):
            with errors_of(f"members.{number}"):
                members.append(member.build(device, files_of(f"members.{number}", assets)))
        return EnsembleExtractor(members, self.member_weights)


class EnsembleExtractor:
    """Extractors of global descriptors, side by side."""

    def __init__(self, members: Sequence[Extractor], weights: Sequence[float]) -> None:
        self._members, self._weights = members, weights

    def extract(self, batch: ImageBatch) -> FeatureBatch:
        """One row (N, sum of D) float32 of length 1 per image."""
        blocks = [member.extract(batch).descriptors for member in self._members]
        return FeatureBatch.of_global(batch.image_ids, side_by_side(blocks, self._weights))
