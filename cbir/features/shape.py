"""Affine shape of blobs: the ellipse whose normalised patch has gradients alike in all directions."""

from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from cbir.features.keypoints import as_ellipses, frames
from cbir.features.patches import blocks, normalised_patches, pyramid
from cbir.types import Array, Floats, Pixels

__all__ = ["RATIO", "Matrices", "SecondMoments", "ShapeEstimator", "reshaped"]

Matrices = npt.NDArray[np.float64]
SIZE, RATIO = 2, 5

SIDE, MARGIN = 19, 2  # the margin keeps the smoothing of one patch from the next
REACH = 4.5  # in scales
SMOOTHING = 0.7
"""The standard deviation of the smoothing before derivatives, in scales."""

WINDOW = 1.5
"""The standard deviation of the weights of the gradients, in scales."""


STEP, SCALE_STEP = 0.5, np.log(2) / 3
"""The longest steps of one iteration: in scales, and of the scale's logarithm."""

NEAR = 0.25
"""How near the maximum is at the end, in steps."""


class ShapeEstimator(Protocol):
    """What gives blobs an affine shape."""

    def ellipses(self, picture: Pixels, blobs: Floats) -> Floats:
        """Ellipses (k, 7) of those blobs (K, 5) of a grey picture (H, W) whose shape is found, in their order."""
        ...


class SecondMoments:
    """Iterative shape adaptation (Lindeberg and Gårding 1997; Mikolajczyk and Schmid 2004).

    Each step looks at the normalised patch of the ellipse so far, and stretches the ellipse by the inverse root of the
    gradients' second moments, until the smaller eigenvalue of these is more than `convergence` of the larger one.
    Smoothing and weights follow the ellipse, so that the same is found after an affine transform. With `relocate`, a
    step also goes towards the maximum of the Hessian's determinant over places and scales, which must be near at last.
    """

    def __init__(self, iterations: int, convergence: float, max_axis_ratio: float, relocate: bool) -> None:
        self._iterations, self._convergence, self._max_axis_ratio = iterations, convergence, max_axis_ratio
        self._relocate = relocate

    def ellipses(self, picture: Pixels, blobs: Floats) -> Floats:
        """Those that converge, one for each place."""
        levels, ellipses = pyramid(picture), as_ellipses(blobs)
        found, active = np.zeros(len(blobs), bool), np.arange(len(blobs))
        for _ in range(self._iterations):
            if not len(active):
                break
            patches = _all_patches(levels, ellipses[active])
            moments = _moments(patches)
            likeness = _likeness(moments)
            at_end = likeness > self._convergence
            if self._relocate:
                steps, is_near = _towards_maximum(patches)
                ellipses[active] = _moved(ellipses[active], np.where(at_end & is_near, 0, steps.T).T)
                at_end &= is_near
            found[active[at_end]] = True
            # Moments of one direction have no inverse.
            going_on = ~at_end & (likeness > self._max_axis_ratio**-4)
            active = active[going_on]
            changed = reshaped(ellipses[active], _inverse_root(moments[going_on]))
            ellipses[active] = changed
            active = active[self._is_possible(changed, blobs[active])]
        return ellipses[found]

    def _is_possible(self, ellipses: Floats, blobs: Floats) -> npt.NDArray[np.bool_]:
        """Whether an ellipse is not too long, and still that of the blob which it began as."""
        drift = np.hypot(*(ellipses[:, :2] - blobs[:, :2]).T)
        growth = np.abs(np.log2(ellipses[:, SIZE] / blobs[:, SIZE]))
        short = ellipses[:, RATIO] * self._max_axis_ratio >= 1
        return np.asarray(short & (drift < blobs[:, SIZE]) & (growth < 1))


def reshaped(ellipses: Floats, shapes: Matrices) -> Floats:
    """The table (K, 7) after a change of each normalised patch by a matrix (K, 2, 2) of determinant 1."""
    (xx, xy), (_, yy) = _outer(frames(ellipses) @ shapes / (ellipses[:, 2, None, None] / 2))
    middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    changed = ellipses.copy()
    # The product of both eigenvalues is 1: their difference would lose the smaller one.
    changed[:, RATIO] = np.minimum(1 / (middle + spread), 1)
    changed[:, RATIO + 1] = np.degrees(np.arctan2(2 * xy, xx - yy)) / 2 % 180
    return changed


def _outer(matrices: Matrices) -> Matrices:
    """Each matrix times its transpose, as (2, 2, K)."""
    rows = matrices.transpose(1, 0, 2)
    return np.array([[(one * other).sum(axis=1) for other in rows] for one in rows])


def _all_patches(levels: list[Floats], ellipses: Floats) -> Floats:
    parts = [normalised_patches(levels, ellipses[rows], SIDE, REACH) for rows in blocks(len(ellipses))]
    return np.concatenate([np.empty((0, SIDE, SIDE), np.float32), *parts])


def _towards_maximum(patches: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Steps (K, 3) to the top of the determinant: x and y in radii, and the logarithm of the scale; and who is near.

    The three parabolas through the centre and its neighbours are taken one by one. Where the determinant curves up,
    the step is the longest one.
    """
    second = (patches.reshape(len(patches), -1) @ _HESSIAN).reshape(len(patches), 7, 3).astype(np.float64)
    at, *around = (second[..., 0] * second[..., 1] - second[..., 2] ** 2).T
    offsets = []
    for before, after in (around[0:2], around[2:4], around[4:6]):
        curvature = np.minimum(before + after - 2 * at, -1e-12)
        offsets.append(np.clip((before - after) / (2 * curvature), -1, 1))
    in_steps = np.stack(offsets, axis=1)
    is_near = (at > 0) & (np.abs(in_steps) < NEAR).all(axis=1)
    return np.asarray(in_steps * [STEP, STEP, SCALE_STEP], np.float32), is_near


def _moved(ellipses: Floats, steps: Floats) -> Floats:
    """Ellipses (K, 7) after steps (K, 3) in their normalised patches."""
    moved = ellipses.copy()
    moved[:, :2] += (frames(ellipses) @ steps[:, :2, None])[:, :, 0]
    moved[:, SIZE] *= np.exp(steps[:, 2])
    return moved


def _moments(patches: Floats) -> Matrices:
    """Weighted means (K, 3) of dx dx, dx dy and dy dy."""
    dx, dy = _gradients(patches)
    products = (dx * dx, dx * dy, dy * dy)
    return np.stack([(product * _WEIGHTS).sum(axis=1, dtype=np.float64) for product in products], axis=1)


def _gradients(patches: Floats) -> tuple[Floats, Floats]:
    """dx and dy (K, P) of the smoothed patches, without the margin."""
    std = SMOOTHING * SIDE / (2 * REACH)
    tall = cv2.GaussianBlur(patches.reshape(-1, SIDE), (2 * MARGIN + 1, 2 * MARGIN + 1), std)
    smooth = tall.reshape(patches.shape)[:, MARGIN - 1 : 1 - MARGIN, MARGIN - 1 : 1 - MARGIN]
    dx = smooth[:, 1:-1, 2:] - smooth[:, 1:-1, :-2]
    dy = smooth[:, 2:, 1:-1] - smooth[:, :-2, 1:-1]
    return dx.reshape(len(patches), -1), dy.reshape(len(patches), -1)


def _likeness(moments: Matrices) -> npt.NDArray[np.float64]:
    """The smaller eigenvalue as a part of the larger one; 0 where there are no gradients."""
    xx, xy, yy = moments.T
    middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    larger = middle + spread
    return np.asarray(np.divide(middle - spread, larger, out=np.zeros_like(larger), where=larger > 0))


def _inverse_root(moments: Matrices) -> Matrices:
    """Moments to the power -1/2 (K, 2, 2), scaled to determinant 1."""
    xx, xy, yy = moments.T
    root = np.sqrt(xx * yy - xy**2)
    made = np.stack([np.stack([yy + root, -xy], axis=1), np.stack([-xy, xx + root], axis=1)], axis=1)
    determinant = made[:, 0, 0] * made[:, 1, 1] - made[:, 0, 1] ** 2
    return np.asarray(made / np.sqrt(determinant)[:, None, None])


def _places(side: int) -> Array:
    """Of the middle pixels of a patch along one axis, in scales."""
    return (np.arange(side) - (side - 1) / 2) * (2 * REACH / SIDE)


def _weights() -> Floats:
    profile = np.exp(-(_places(SIDE - 2 * MARGIN) ** 2) / (2 * WINDOW**2))
    return np.asarray(np.outer(profile, profile).ravel(), np.float32)


def _hessian_templates() -> Floats:
    """(SIDE * SIDE, 7 * 3): a patch times these is Lxx, Lyy, Lxy at the centre and its neighbours in x, y and scale."""
    columns = []
    for x, y, growth in ((0, 0, 0), (-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)):
        sigma = np.exp(growth * SCALE_STEP)
        across, down = (_derivatives(_places(SIDE) - step * STEP, sigma) for step in (x, y))
        columns += [np.outer(down[i], across[j]).ravel() for i, j in ((0, 2), (2, 0), (1, 1))]
    return np.ascontiguousarray(np.stack(columns, axis=1), np.float32)


def _derivatives(places: Array, sigma: float) -> tuple[Array, Array, Array]:
    """A Gaussian of sum 1, its first and second derivative, these times sigma and its square, and of sum 0."""
    gauss = np.exp(-(places**2) / (2 * sigma**2))
    gauss /= gauss.sum()
    first, second = places / sigma * gauss, (places**2 / sigma**2 - 1) * gauss
    return gauss, first - first.mean(), second - second.mean()


_WEIGHTS, _HESSIAN = _weights(), _hessian_templates()
