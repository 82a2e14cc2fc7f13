"""The aggregated selective match kernel, with and without regions."""

import functools
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from cbir.encoding.vocabulary import Vocabulary
from cbir.index.inverted.embedding import aggregated, regional
from cbir.index.inverted.inverted import InvertedSpec, Phi
from cbir.index.inverted.kernels import BinaryKernel, FloatKernel, MatchKernel, monomial_table
from cbir.types import State

__all__ = ["Asmk", "RAsmk"]


class Asmk(InvertedSpec):
    """ASMK (Tolias et al. 2013): the residuals of an image's features to a word are summed and brought to unit length,
    and two such vectors u, v of a word count sigma(<u, v>) = sign(x) |x|^alpha where x >= tau, else 0.

    `binary`, the method's star version: only the signs of a vector's components are stored, D bits, and
    x = 1 - 2 h / D for the Hamming distance h. Scores are divided by the roots of the numbers of words (with `idf`, of
    the sums of their weights) of both images.
    """

    name: Literal["asmk"] = "asmk"
    paper: ClassVar[str] = "Tolias et al., To aggregate or not to aggregate: selective match kernels, ICCV 2013"

    query_assignments: int = Field(default=5, ge=1, description="nearest words of a feature of a query")
    binary: bool = Field(default=True, description="store signs only (ASMK*): D / 8 instead of 4 D bytes per posting")
    alpha: PositiveFloat = Field(default=3.0, description="selectivity: higher forgets unlike vectors")
    tau: float = Field(default=0.0, ge=-1, le=1, description="similarity below which two vectors do not match")
    normalise: bool = Field(default=True, description="divide by the norms of both images")

    def kernel(self, dim: int) -> MatchKernel:
        """Signs with a table, or vectors of unit length."""
        if self.binary:
            return BinaryKernel(monomial_table(dim, self.alpha, self.tau), normalise=self.normalise)
        return FloatKernel(dim, self.alpha, self.tau, normalise=self.normalise)

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:  # noqa: ARG002 - only a codebook is trained
        """Sums of residuals."""
        return functools.partial(aggregated, centroids=vocabulary.centroids)


class RAsmk(Asmk):
    """R-ASMK (Teichmann et al. 2019): an indexed image's vector of a word is the mean over its regions (`proposer` of
    the channel) of the regions' vectors, brought to unit length; queries are those of ASMK.

    `naive`: the mean of the regions' unit vectors is not brought to unit length again, so that a word that few regions
    have counts little.
    """

    needs_regions: ClassVar[bool] = True

    name: Literal["rasmk"] = "rasmk"  # type: ignore[assignment]
    paper: ClassVar[str] = "Teichmann et al., Detect-to-retrieve: efficient regional aggregation, CVPR 2019"

    query_assignments: int = Field(default=1, ge=1, description="nearest words of a feature of a query")
    binary: bool = Field(default=True, description="store signs only (R-ASMK*): D / 8 instead of 4 D bytes per posting")
    naive: bool = Field(default=False, description="average unit vectors (Naive-R-ASMK); needs binary: false")

    def kernel(self, dim: int) -> MatchKernel:
        """As ASMK's; naive means keep their lengths."""
        if self.naive:
            return FloatKernel(dim, self.alpha, self.tau, unit=False, normalise=self.normalise)
        return super().kernel(dim)

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:  # noqa: ARG002 - only a codebook is trained
        """Means over regions."""
        return functools.partial(regional, centroids=vocabulary.centroids, unit=self.naive)

    def query_phi(self, vocabulary: Vocabulary, own: State) -> Phi:
        """Sums of residuals."""
        return super().phi(vocabulary, own)
