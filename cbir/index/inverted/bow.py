"""Bags of visual words: how often an image has a word, and nothing else of its features."""

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeFloat

from cbir.encoding.vocabulary import Vocabulary
from cbir.index.inverted.embedding import counted
from cbir.index.inverted.inverted import InvertedSpec, Phi
from cbir.index.inverted.kernels import Bm25Kernel, CountKernel, MatchKernel
from cbir.types import Int64s, State

__all__ = ["Bm25", "Bow"]


class Bow(InvertedSpec):
    """BoW (Sivic and Zisserman 2003): the cosine of histograms of visual words, weighted by tf-idf.

    `root` takes square roots of the counts, against bursts of one word (Jégou et al. 2009).
    """

    name: Literal["bow"] = "bow"
    paper: ClassVar[str] = "Sivic and Zisserman, Video Google: a text retrieval approach to object matching, ICCV 2003"

    idf: bool = Field(default=True, description="weight counts by ln(N / n), for n of N images that have the word")
    root: bool = Field(default=False, description="square roots of counts, against repeated structures")

    def kernel(self, dim: int) -> MatchKernel:  # noqa: ARG002 - a posting is a count
        """Products of counts."""
        return CountKernel(self.root)

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:  # noqa: ARG002 - words say everything
        """Counts."""
        return counted


class Bm25(InvertedSpec):
    """BM25 with exponential idf (Murata et al. 2018, after Robertson et al. 1994): an image of L features that has a
    word t times gets idf^power t (k1 + 1) / (t + k1 (1 - b + b L / mean L)) for each time that the query has it.
    """

    name: Literal["bm25"] = "bm25"
    paper: ClassVar[str] = "Murata et al., Bayesian exponential inverse document frequency and region-of-interest, 2018"

    k1: NonNegativeFloat = Field(default=1.2, description="how far repetitions count; 0: not at all")
    b: float = Field(default=0.75, ge=0, le=1, description="how far long images are damped")
    idf: bool = Field(default=True, description="weight a word by ln(N / n)^power, for n of N images that have it")
    power: NonNegativeFloat = Field(default=1.0, description="exponent of idf")

    def kernel(self, dim: int) -> MatchKernel:  # noqa: ARG002 - a posting is a count
        """Saturated counts."""
        return Bm25Kernel(self.k1, self.b)

    def phi(self, vocabulary: Vocabulary, own: State) -> Phi:  # noqa: ARG002 - words say everything
        """Counts."""
        return counted

    def word_weights(self, images: int, word_images: Int64s) -> npt.NDArray[np.float64]:
        """w_c (W,): ln(N / n)^power."""
        if not self.idf:
            return np.ones(len(word_images))
        return np.log(max(images, 1) / np.maximum(word_images, 1)) ** self.power
