"""Mixtures of Gaussians with diagonal covariances: the soft codebooks of Fisher vectors."""

from dataclasses import dataclass

import numba
import numpy as np

from cbir.encoding.codebook import Codebook
from cbir.encoding.product import check_dim
from cbir.errors import DataError
from cbir.types import Array, Float64s

__all__ = ["Gmm"]

ROWS_PER_GAUSSIAN = 1024
"""More training rows per Gaussian are sampled down, by the seed: they cost time and move the mixture little."""

KMEANS_ITERATIONS = 10
"""Rounds of k-means that EM starts from."""

FLOOR = 1e-4
"""Variances are at least this share of the sample's along the dimension."""

LEAST_WEIGHT = 1e-8
"""Of a Gaussian that has lost its rows."""

BLOCK = 4096
"""Rows at a time, so that the posteriors of all rows need not be held."""


@dataclass(frozen=True)
class Gmm:
    """Mixture of Gaussians: `weights` (W,), sum 1, `means` (W, D) and `variances` (W, D), all float64."""

    weights: Float64s
    means: Float64s
    variances: Float64s

    @classmethod
    def train(cls, rows: Array, gaussians: int, iterations: int, seed: int) -> "Gmm":
        """EM (Dempster, Laird and Rubin 1977) on rows (n, D), from the cells of k-means.

        DataError with fewer rows than Gaussians, or with rows that are not finite.
        """
        if len(rows) < gaussians:
            raise DataError(
                f"gaussians: {gaussians} Gaussians need at least as many descriptors, but the sample has {len(rows)}; "
                f"set gaussians to at most {len(rows)}, or take a larger sample"
            )
        codebook = Codebook.train(rows, gaussians, KMEANS_ITERATIONS, seed)
        most = gaussians * ROWS_PER_GAUSSIAN
        if len(rows) > most:
            rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))]
        points = np.ascontiguousarray(rows, np.float64)
        floor = np.maximum(FLOOR * points.var(axis=0), np.finfo(np.float32).tiny)
        mixture = cls._of_cells(points, codebook, floor)
        for _ in range(iterations):
            mixture = mixture.improved(points, floor)
        return mixture

    @classmethod
    def _of_cells(cls, rows: Float64s, codebook: Codebook, floor: Float64s) -> "Gmm":
        posteriors = np.eye(len(codebook))[codebook.assign(rows)]
        start = cls(np.ones(len(codebook)), codebook.centroids.astype(np.float64), np.tile(floor, (len(codebook), 1)))
        return start._maximised(posteriors.sum(axis=0), posteriors.T @ rows, posteriors.T @ (rows * rows), floor)

    def improved(self, rows: Float64s, floor: Float64s) -> "Gmm":
        """One round of EM on rows (n, D), with no variance below `floor` (D,): no less likely than before."""
        masses, sums, squares = np.zeros(len(self.weights)), np.zeros(self.means.shape), np.zeros(self.means.shape)
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            posteriors = self.posteriors(block)
            masses += posteriors.sum(axis=0)
            sums += posteriors.T @ block
            squares += posteriors.T @ (block * block)
        return self._maximised(masses, sums, squares, floor)

    def posteriors(self, rows: Array) -> Float64s:
        """p(w | x) of rows (n, D): (n, W), each row's sum 1; a row's depend on this row alone. DataError by D."""
        return self._densities(rows)[0]

    def log_likelihoods(self, rows: Array) -> Float64s:
        """ln p(x) of rows (n, D): (n,)."""
        return self._densities(rows)[1]

    def _densities(self, rows: Array) -> tuple[Float64s, Float64s]:
        check_dim(rows, self.means.shape[1])
        constants = np.log(self.weights) - 0.5 * np.add.reduce(np.log(2 * np.pi * self.variances), axis=1)
        posteriors, logs = np.empty((len(rows), len(self.weights))), np.empty(len(rows))
        means, precisions = np.ascontiguousarray(self.means.T), np.ascontiguousarray(0.5 / self.variances.T)
        _densities(np.require(rows, np.float64, ["C", "W"]), constants, means, precisions, posteriors, logs)
        return posteriors, logs

    def _maximised(self, masses: Float64s, sums: Float64s, squares: Float64s, floor: Float64s) -> "Gmm":
        """The mixture that makes rows of these moments (W,), (W, D), (W, D) likeliest; empty Gaussians stay."""
        filled = masses > LEAST_WEIGHT
        safe = np.where(filled, masses, 1.0)[:, None]
        means = np.where(filled[:, None], sums / safe, self.means)
        variances = np.where(filled[:, None], np.maximum(squares / safe - means * means, floor), self.variances)
        weights = np.maximum(masses / masses.sum(), LEAST_WEIGHT)
        return Gmm(weights / weights.sum(), means, variances)


@numba.njit(cache=True, nogil=True)
def _densities(
    rows: Float64s, constants: Float64s, means: Float64s, precisions: Float64s, posteriors: Float64s, logs: Float64s
) -> None:
    """Posteriors (n, W) and log-likelihoods (n,) in log space; means and half precisions are (D, W)."""
    num = len(constants)
    for i in range(len(rows)):
        scores = posteriors[i]
        scores[:] = constants
        for d in range(rows.shape[1]):
            x = rows[i, d]
            for w in range(num):
                difference = x - means[d, w]
                scores[w] -= difference * difference * precisions[d, w]
        highest = scores[0]
        for w in range(1, num):
            highest = max(highest, scores[w])
        total = 0.0
        for w in range(num):
            scores[w] = np.exp(scores[w] - highest)
            total += scores[w]
        for w in range(num):
            scores[w] /= total
        logs[i] = highest + np.log(total)
