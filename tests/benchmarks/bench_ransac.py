"""How fast and how good the robust estimators are beside OpenCV's plain RANSAC; prints a Markdown table.

Run: python tests/benchmarks/bench_ransac.py

200 matches per scene, a share of them true with 0.5 px of noise, threshold 8 px, at most 5,000 iterations, confidence
0.999, one thread. Every scene is solved by all estimators in turn. "Off" is the largest distance, over the true
matches, between where the found transform and the true one put the point.
"""

import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from cbir.rerank.ransac import Ransac

NUM_SCENES, NUM_MATCHES = 60, 200
THRESHOLD_PX, MAX_ITERATIONS, CONFIDENCE = 8.0, 5000, 0.999

Estimate = Callable[[np.ndarray], np.ndarray | None]


def transform(rng: np.random.Generator, model: str) -> np.ndarray:
    angle, scale = rng.uniform(-0.5, 0.5), rng.uniform(0.6, 1.5)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.eye(3)
    matrix[:2, :2] = scale * rotation @ np.array([[1, rng.uniform(-0.2, 0.2)], [0, rng.uniform(0.8, 1.2)]])
    matrix[:2, 2] = rng.uniform(-50, 50, 2)
    if model == "homography":
        matrix[2, :2] = rng.uniform(-3e-4, 3e-4, 2)
    return matrix


def mapped(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    full = matrix if len(matrix) == 3 else np.vstack([matrix, [0, 0, 1]])
    wide = np.hstack([points, np.ones((len(points), 1))]) @ full.T
    return wide[:, :2] / wide[:, 2:]


def scene(seed: int, model: str, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Matches (M, 4), the true ones first, and the true transform."""
    rng, num_true = np.random.default_rng(seed), int(share * NUM_MATCHES)
    matrix, points = transform(rng, model), rng.uniform(0, 1, (NUM_MATCHES, 2)) * [640, 480]
    there = mapped(matrix, points) + rng.normal(0, 0.5, points.shape)
    there[num_true:] = rng.uniform(0, 1, (NUM_MATCHES - num_true, 2)) * [640, 480]
    return np.hstack([points, there]).astype(np.float32), matrix


def plain_ransac(model: str) -> Estimate:
    limits: dict[str, Any] = {
        "ransacReprojThreshold": THRESHOLD_PX,
        "maxIters": MAX_ITERATIONS,
        "confidence": CONFIDENCE,
        "method": cv2.RANSAC,
    }
    solve = cv2.estimateAffine2D if model == "affine" else cv2.findHomography
    return lambda points: solve(points[:, :2].copy(), points[:, 2:].copy(), **limits)[0]


def ours(model: str, method: str) -> Estimate:
    fields = {"threshold_px": THRESHOLD_PX, "max_iterations": MAX_ITERATIONS, "confidence": CONFIDENCE}
    return Ransac.model_validate({"channel": "local", "model": model, "method": method, **fields}).build().estimate


def measure(model: str, share: float) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds and pixels off, by estimator, over all scenes."""
    estimators = {
        "cv2.RANSAC": plain_ransac(model),
        "usac_fast": ours(model, "usac_fast"),
        "magsac": ours(model, "magsac"),
    }
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in estimators}
    for seed in range(NUM_SCENES):
        matches, truth = scene(seed, model, share)
        inside = matches[: int(share * NUM_MATCHES), :2]
        for name, estimate in estimators.items():
            start = time.perf_counter()
            matrix = estimate(matches)
            found[name][0].append((time.perf_counter() - start) * 1e3)
            off = np.inf if matrix is None else np.abs(mapped(matrix, inside) - mapped(truth, inside)).max()
            found[name][1].append(float(off))
    return found


def main() -> None:
    cv2.setNumThreads(1)
    print("| model | true matches | estimator | median ms | times cv2.RANSAC | median px off | scenes under 2 px off |")
    print("|---|---|---|---|---|---|---|")
    for model in ("affine", "homography"):
        for share in (0.5, 0.2, 0.1):
            found = measure(model, share)
            base = np.median(found["cv2.RANSAC"][0])
            for name, (milliseconds, off) in found.items():
                median, good = np.median(milliseconds), np.mean(np.array(off) < 2)
                columns = f"{median:.2f} | {base / median:.1f} | {np.median(off):.2f} | {good:.0%}"
                print(f"| {model} | {share:.0%} | {name} | {columns} |")


if __name__ == "__main__":
    main()
