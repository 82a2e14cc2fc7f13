"""What extractors that run a timm network share: its name, its weights, its colours. Nothing here needs torch."""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from cbir.features.extractor import ExtractorSpec
from cbir.features.weights import Sha256, is_file

__all__ = ["BackboneSpec"]

Colour = tuple[float, float, float]
SET_BY_CBIR = ("pretrained", "pretrained_cfg", "checkpoint_path", "features_only", "in_chans")


class BackboneSpec(ExtractorSpec):
    """Configuration of an extractor with a timm network (see `Deep` for what the fields mean)."""

    backbone: str = Field(examples=["resnet50"])
    backbone_args: dict[str, bool | int | float | str] = Field(default_factory=dict)
    weights: str = "hub"
    weights_sha256: Sha256 | None = None
    seed: int = 0
    mean: Colour | None = None
    std: Colour | None = None

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if self.weights_sha256 and not self.weights_are_a_file:
            raise ValueError(f"weights_sha256 needs weights that are a file, found weights: {self.weights}")
        if taken := sorted(self.backbone_args.keys() & set(SET_BY_CBIR)):
            raise ValueError(f"backbone_args must not hold {', '.join(taken)}: use weights and weights_sha256")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, found {self.std}")
        return self

    @property
    def weights_are_a_file(self) -> bool:
        """Whether `weights` is a path or a URI, not the name of weights on the hub."""
        return is_file(self.weights)

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, where they are a file."""
        return {"weights": self.weights} if self.weights_are_a_file else {}
