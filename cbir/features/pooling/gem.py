"""Generalised-mean pooling."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, WithJsonSchema

from cbir.errors import ConfigError
from cbir.features.pooling.pooling import PoolingSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GeM"]

_NUMBER = {"type": "number", "exclusiveMinimum": 0}
_NUMBER_OR_NUMBERS = {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}], "title": "P"}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Exponents = Annotated[
    tuple[PositiveFloat, ...], Field(min_length=1), BeforeValidator(_listed), WithJsonSchema(_NUMBER_OR_NUMBERS)
]


class GeM(PoolingSpec):
    """Generalised mean (Radenović et al. 2019): (mean of x^p)^(1/p) of the activations, clamped from below at eps.

    p = 1 is the average, a large p nears the maximum. Negative activations count as eps, so that networks whose maps
    are not rectified (transformers) are better served by `spoc`.
    """

    name: Literal["gem"] = "gem"
    paper: ClassVar[str] = "Radenović, Tolias, Chum, Fine-tuning CNN image retrieval with no human annotation, 2019"

    p: Exponents = (3.0,)
    """One exponent, or a list of as many as there are maps (GeMmp)."""
    eps: PositiveFloat = 1e-6

    @property
    def scale_power(self) -> float:
        """p, so that the mean over scales is the one over places; 1 where every map has its own."""
        return self.p[0] if len(self.p) == 1 else 1.0

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C), every value at least eps. ConfigError if there are several p but not C."""
        p = self.p[0] if len(self.p) == 1 else self._exponents(maps)
        maps = maps.clamp(min=self.eps)
        # Relative to the largest activation no power can overflow, whatever p is.
        peaks = maps.amax((-2, -1), keepdim=True)
        means = (maps / peaks).pow(p).mean((-2, -1), keepdim=True).pow(1 / p)
        return (means * peaks)[..., 0, 0]

    def _exponents(self, maps: "Tensor") -> "Tensor":
        """(C, 1, 1)."""
        exponents = maps.new_tensor(self.p)
        if len(exponents) != maps.shape[1]:
            raise ConfigError(
                f"extractor.pooling.p: {len(exponents)} exponents for {maps.shape[1]} maps; give one number for all "
                "maps, or as many as the backbone has maps"
            )
        return exponents.view(-1, 1, 1)
