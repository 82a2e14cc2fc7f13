"""Sum poolings: the mean of each map, plain, weighted by the centre, by sparsity or by what the map shows."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from cbir.features.pooling.pooling import PoolingSpec, weighted_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Crow", "Interactive", "Spoc"]


class Spoc(PoolingSpec):
    """Sum-pooled convolutional features (Babenko and Lempitsky 2015): the mean of each map."""

    name: Literal["spoc"] = "spoc"
    paper: ClassVar[str] = "Babenko, Lempitsky, Aggregating deep convolutional features for image retrieval, ICCV 2015"

    centre_prior: PositiveFloat | None = None
    """Weigh places by a Gaussian around the centre; its sigma as a part of the distance from the centre to the nearest
    border, 0.333 in the paper. Unset: no prior."""

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        if self.centre_prior is None:
            return maps.mean((-2, -1))
        return (maps * _centre_weights(maps, self.centre_prior)).sum((-2, -1))


class Crow(PoolingSpec):
    """Cross-dimensional weighting (Kalantidis, Mellina, Osindero 2016) with a = b = 2.

    The weight of a place is the square root of its sum over maps, relative to the l2 norm of these sums; that of map c
    is log(sum of Q / Q_c), where Q_c is the part of its places that are above 0. Negative activations count as 0.
    """

    name: Literal["crow"] = "crow"
    paper: ClassVar[str] = (
        "Kalantidis, Mellina, Osindero, Cross-dimensional weighting for aggregated deep features, 2016"
    )

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C), nothing below 0; maps of zeros give 0."""
        maps = maps.clamp(min=0)
        sums = maps.sum(1, keepdim=True)
        places = (sums / sums.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)).sqrt()
        pooled: Tensor = (maps * places).sum((-2, -1)) * _rarity(maps)
        return pooled


class Interactive(PoolingSpec):
    """Places weighted by the strongest maps, after InterActive (Xie et al. 2016).

    In place of activations that are propagated back from the classifier, the weight of a place is the sum of the
    `strongest` maps of highest mean, negative values as 0; with all maps and a constant sum this is `spoc`.
    """

    name: Literal["interactive"] = "interactive"
    paper: ClassVar[str] = "Xie, Zheng, Wang, Yuille, Tian, InterActive: inter-layer activeness propagation, CVPR 2016"

    strongest: PositiveInt = 32

    def pool(self, maps: "Tensor") -> "Tensor":
        """(N, C, H, W) -> (N, C)."""
        activations = maps.clamp(min=0)
        # A stable order: of equal means, the first map is taken.
        order = activations.mean((-2, -1)).argsort(dim=1, descending=True, stable=True)[:, : self.strongest]
        strongest = activations.take_along_dim(order[:, :, None, None], 1)
        return weighted_mean(maps, strongest.sum(1, keepdim=True))


def _centre_weights(maps: "Tensor", part: float) -> "Tensor":
    """The Gaussian over the places of maps, summing to 1: (H, W)."""
    import torch

    height, width = maps.shape[-2:]
    # In float64, so that the two halves of a map are weighted alike to the bit.
    rows, columns = (
        torch.arange(side, dtype=torch.float64, device=maps.device) - (side - 1) / 2 for side in (height, width)
    )
    sigma = part * min(height, width) / 2
    exponents = -(rows[:, None] ** 2 + columns**2) / (2 * sigma**2)
    return exponents.flatten().softmax(0).view(height, width).to(maps.dtype)


def _rarity(maps: "Tensor") -> "Tensor":
    """log(sum of Q / Q_c), 0 for maps of zeros: (N, C)."""
    import torch

    nonzero = (maps > 0).to(maps.dtype).mean((-2, -1))
    rarity = (nonzero.sum(1, keepdim=True) / nonzero.clamp(min=1e-12)).log()
    return torch.where(nonzero > 0, rarity, 0)
