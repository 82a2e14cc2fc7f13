"""Pooling of feature maps: (N, C, H, W) -> (N, C).

Importing this imports no torch: a pooling mostly calls methods of the tensor that it is given.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from cbir.spec import Method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GeM", "Mac", "PoolingSpec", "Spoc", "WeightedSpoc"]


class PoolingSpec(Method):
    """Configuration of a pooling, and the pooling itself: it has no state."""

    role: ClassVar[str] = "pooling"

    @property
    def scale_power(self) -> float:
        """The exponent of the power mean over the scales of one image; 1 where descriptors may be negative."""
        return 1.0

    def pool(self, maps: "Tensor") -> "Tensor":
        """One value per map: (N, C, H, W) -> (N, C)."""
        raise NotImplementedError


class GeM(PoolingSpec):
    """Generalised mean (Radenović et al. 2019): (mean of x^p)^(1/p) of the activations, clamped from below at eps.

    p = 1 is the average, a large p nears the maximum. Negative activations count as eps, so that networks whose maps
    are not rectified (transformers) are better served by `spoc`.
    """

    name: Literal["gem"] = "gem"
    paper: ClassVar[str] = "Radenović, Tolias, Chum, Fine-tuning CNN image retrieval with no human annotation, 2019"

    p: PositiveFloat = 3.0
    eps: PositiveFloat = 1e-6

    @property
    def scale_power(self) -> float:
        """p: the mean over scales is the one over places."""
        return self.p

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C), every value at least eps."""
        maps = maps.clamp(min=self.eps)
        # Relative to the largest activation no power can overflow, whatever p is.
        peaks = maps.amax((-2, -1), keepdim=True)
        return (maps / peaks).pow(self.p).mean((-2, -1)).pow(1 / self.p) * peaks[..., 0, 0]


class Mac(PoolingSpec):
    """Maximum activations of convolutions (Tolias, Sicre, Jégou 2016): the largest value of each map."""

    name: Literal["mac"] = "mac"
    paper: ClassVar[str] = "Tolias, Sicre, Jégou, Particular object retrieval with integral max-pooling, ICLR 2016"

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        return maps.amax((-2, -1))


class Spoc(PoolingSpec):
    """Sum-pooled convolutional features (Babenko and Lempitsky 2015) without centre prior: the mean of each map."""

    name: Literal["spoc"] = "spoc"
    paper: ClassVar[str] = "Babenko, Lempitsky, Aggregating deep convolutional features for image retrieval, ICCV 2015"

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        return maps.mean((-2, -1))


class WeightedSpoc(PoolingSpec):
    """The global descriptor of HOW (Tolias et al. 2020): the mean of places averaged over 3 x 3, weighted by attention.

    The attention of a place is the l2 norm of its vector before averaging.
    """

    name: Literal["weighted_spoc"] = "weighted_spoc"
    paper: ClassVar[str] = "Tolias, Jenicek, Chum, Learning and aggregating deep local descriptors, ECCV 2020"

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        from torch.nn.functional import avg_pool2d

        smoothed = avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        attention = maps.norm(dim=1, keepdim=True)
        pooled: Tensor = (smoothed * attention).sum((-2, -1)) / attention.sum((-2, -1)).clamp(min=1e-12)
        return pooled
