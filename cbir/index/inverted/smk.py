"""The selective match kernel."""

import functools
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from cbir.encoding.vocabulary import Vocabulary
from cbir.index.inverted.embedding import single
from cbir.index.inverted.inverted import InvertedSpec, Phi
from cbir.index.inverted.kernels import BinaryKernel, ConsistentKernel, FloatKernel, MatchKernel, monomial_table
from cbir.types import State

__all__ = ["Smk"]


class Smk(InvertedSpec):
    """SMK (Tolias et al. 2013): ASMK without aggregation. Every pair of features of a word counts sigma(<u, v>) of
    their residuals, brought to unit length; with `binary` (SMK*) of the residuals' signs.
    `geometry` is weak geometric consistency, as in Hamming embedding (he).
    """

    name: Literal["smk"] = "smk"
    paper: ClassVar[str] = "Tolias et al., To aggregate or not to aggregate: selective match kernels, ICCV 2013"

    query_assignments: int = Field(default=5, ge=1, description="nearest words of a feature of a query")
    binary: bool = Field(default=True, description="store signs only (SMK*): D / 8 instead of 4 D bytes per posting")
    alpha: PositiveFloat = Field(default=3.0, description="selectivity: higher forgets unlike residuals")
    tau: float = Field(default=0.0, ge=-1, le=1, description="similarity below which two residuals do not match")

    geometry: bool = Field(
        default=False,
        description="weak geometric consistency: keep two more bytes of a feature, its angle and scale, and score an "
        "image by matches that agree on them; needs binary: true",
    )

    @model_validator(mode="after")
    def _signs_with_geometry(self) -> Self:
        if self.geometry and not self.binary:
            raise ValueError("geometry: needs binary: true, because matches of vectors cast no votes")
        return self

    def kernel(self, dim: int) -> MatchKernel:
        """Signs with a table, or vectors of unit length."""
        if self.binary:
            kernel = ConsistentKernel if self.geometry else BinaryKernel
            return kernel(monomial_table(dim, self.alpha, self.tau))
        return FloatKernel(dim, self.alpha, self.tau)

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:  # noqa: ARG002 - only a codebook is trained
        """Residuals."""
        return functools.partial(single, centroids=vocabulary.centroids)
