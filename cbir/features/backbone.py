"""What extractors that run a network share: its name, layers, weights and colours. Nothing here needs torch."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from cbir.errors import ConfigError
from cbir.features.extractor import ExtractorSpec
from cbir.features.weights import Sha256, is_file
from cbir.spec import Method

__all__ = ["TORCHVISION", "BackboneSpec", "Layer", "Layers", "NetworkSpec", "errors_of"]

TORCHVISION = "torchvision/"
"""What the name of a backbone begins with that is not of timm."""

Layer = int | str
"""A map of timm by its number, from the last (-1) back if negative; a module of the network by its name, such as
`layer3.5`; or `fc6`, `fc7` and `fc8`, the fully connected layers of AlexNet and VGG, rectified but for the last."""


def _in_order(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    numbers = [layer for layer in layers if isinstance(layer, int)]
    rising = all(one < other for one, other in itertools.pairwise(numbers))
    if len(set(layers)) < len(layers) or not rising or len({number < 0 for number in numbers}) > 1:
        raise ValueError(
            f"layers must differ, and their numbers rise and count all from the first (0) or all from the last (-1), "
            f"found {list(layers)}"
        )
    return layers


Layers = Annotated[tuple[Layer, ...], AfterValidator(_in_order)]
"""Layers of a network; none stands for its last map, with all that follows it but the classifier."""

Colour = tuple[float, float, float]
SET_BY_CBIR = ("weights", "pretrained", "pretrained_cfg", "checkpoint_path", "features_only", "in_chans")


class NetworkSpec(Method):
    """Configuration of a method with a network (see `Deep` for what the fields mean)."""

    backbone: str = Field(examples=["resnet50"])
    backbone_args: dict[str, bool | int | float | str] = Field(default_factory=dict)
    weights: str = "hub"
    weights_sha256: Sha256 | None = None
    seed: int = 0
    mean: Colour | None = None
    std: Colour | None = None
    licence: str | None = None
    """That of the weights: a note for those who use the index, kept with its settings."""

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if self.weights_sha256 and not self.weights_are_a_file:
            raise ValueError(f"weights_sha256 needs weights that are a file, found weights: {self.weights}")
        if taken := sorted(self.backbone_args.keys() & set(SET_BY_CBIR)):
            raise ValueError(f"backbone_args must not hold {', '.join(taken)}: use weights and weights_sha256")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std must be above 0, found {self.std}")
        return self

    def identity(self) -> dict[str, Any]:
        """All fields but the licence, which changes no feature."""
        return {field: value for field, value in super().identity().items() if field != "licence"}

    @property
    def weights_are_a_file(self) -> bool:
        """Whether `weights` is a path or a URI, not the name of weights on the hub."""
        return is_file(self.weights)

    @property
    def assets(self) -> Mapping[str, str]:
        """The weights, where they are a file."""
        return {"weights": self.weights} if self.weights_are_a_file else {}


class BackboneSpec(NetworkSpec, ExtractorSpec):
    """Configuration of an extractor with a network."""


@contextlib.contextmanager
def errors_of(part: str) -> Iterator[None]:
    """ConfigErrors of an extractor that stands at a place such as `members.0` in another one name that place."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"extractor.{part}.{str(error).removeprefix('extractor.')}") from error
