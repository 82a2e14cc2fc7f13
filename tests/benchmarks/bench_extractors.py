"""How fast extractors are beside the same calls of bare OpenCV; prints a Markdown table.

Run: python tests/benchmarks/bench_extractors.py

Photographs of $CBIR_TEST_DATA (default ../shared/data), else of scikit-image: at most 640 pixels a side, and four of
them as one picture of 1,024; 1,000 features, one thread. Each image is extracted by the extractor and by bare OpenCV in
turn, three times, and the fastest of each counts. Bare OpenCV makes the image grey, detects, keeps the strongest and
describes; its keypoints stay objects, ties and the border are not looked after, and MSER's regions become circles.
"Ratio" is the rate of the extractor divided by that of bare OpenCV; where OpenCV has no such calls, there is none.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import TypeAdapter

import cbir.features  # noqa: F401 - registers the extractors
from cbir.images import Decoded, Limits, View, decode
from cbir.spec import one_of
from cbir.types import ImageBatch, Pixels

NUM_IMAGES, NUM_ROUNDS, NUM_FEATURES = 8, 3, 1000
SIZES = (640, 1024)

Bare = Callable[[Pixels], Any]


def photographs() -> list[bytes]:
    root = Path(os.environ.get("CBIR_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    paths = sorted((root / "photos").rglob("*.jpg"))
    if paths:
        return [path.read_bytes() for path in paths[:: max(1, len(paths) // NUM_IMAGES)][:NUM_IMAGES]]
    from skimage import data

    pictures = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.retina())
    return [cv2.imencode(".png", picture[..., ::-1])[1].tobytes() for picture in pictures]


def pixels_of(view: View) -> list[Pixels]:
    decoded = [decode(data, view, Limits()) for data in photographs()]
    return [image.pixels for image in decoded if isinstance(image, Decoded)]


def images_of(size: int) -> list[Pixels]:
    """Photographs of 640 pixels, larger pictures of four each."""
    if size == SIZES[0]:
        return pixels_of(View(size=size))
    quarters = pixels_of(View(size=size // 2, fit="stretch"))
    return [
        np.vstack([np.hstack([a, b]), np.hstack([c, d])])
        for a, b, c, d in zip(*(quarters[start:] + quarters[:start] for start in range(4)), strict=True)
    ]


def grey(image: Pixels) -> Any:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def strongest(keypoints: Sequence[Any]) -> list[Any]:
    return sorted(keypoints, key=lambda keypoint: -keypoint.response)[:NUM_FEATURES]


def sift(num_features: int = 0) -> Any:
    return cv2.SIFT.create(num_features, 3, 0.04, 10, 1.6, cv2.CV_8U, True)


def at_once(algorithm: Any) -> Bare:
    return lambda image: algorithm.detectAndCompute(grey(image), None)


def in_turn(detector: Any, descriptor: Any) -> Bare:
    def run(image: Pixels) -> Any:
        picture = grey(image)
        return descriptor.compute(picture, strongest(detector.detect(picture, None)))

    return run


def mser_sift(image: Pixels) -> Any:
    picture = grey(image)
    regions = MSER.detectRegions(picture)[0]
    largest = sorted(regions, key=len, reverse=True)[:NUM_FEATURES]
    circles = [(*region.mean(axis=0), 2 * float(region.std(axis=0).mean())) for region in largest]
    return SIFT.compute(picture, [cv2.KeyPoint(x, y, size) for x, y, size in circles])


def three_sifts(code: int) -> Bare:
    def run(image: Pixels) -> Any:
        keypoints = strongest(SIFT.detect(grey(image), None))
        return [SIFT.compute(np.ascontiguousarray(plane), keypoints) for plane in cv2.split(cv2.cvtColor(image, code))]

    return run


SIFT, MSER = sift(), cv2.MSER.create(5, 60, 14_400, 0.25, 0.0)


def local(detector: str, descriptor: str, **fields: Any) -> dict[str, Any]:
    return {"name": "local", "detector": {"name": detector}, "descriptor": {"name": descriptor}, **fields}


def contestants() -> dict[str, tuple[dict[str, Any], Bare | None]]:
    """What is measured, with what bare OpenCV does for it."""
    contrib = cv2.xfeatures2d
    fast = cv2.FastFeatureDetector.create(10)
    return {
        "sift": ({"name": "sift"}, at_once(sift(NUM_FEATURES))),
        "sift, upright": ({"name": "sift", "upright": True}, in_turn(SIFT, SIFT)),
        "orb": (local("orb", "orb"), at_once(cv2.ORB.create(NUM_FEATURES))),
        "akaze": (local("akaze", "akaze"), at_once(contrib.AKAZE.create())),
        "brisk": (local("brisk", "brisk"), at_once(contrib.BRISK.create())),
        "mser + sift": (local("mser", "sift"), mser_sift),
        "mser + sift, upright": (local("mser", "sift", upright=True), mser_sift),
        "dense + sift": (local("dense", "sift"), None),
        "fast + brief": (
            local("fast", "brief", upright=True),
            in_turn(fast, contrib.BriefDescriptorExtractor.create()),
        ),
        "fast + freak": (local("fast", "freak"), in_turn(fast, contrib.FREAK.create())),
        "dog + hsv_sift": (local("dog", "hsv_sift"), three_sifts(cv2.COLOR_RGB2HSV_FULL)),
        "dog + opponent_sift": (local("dog", "opponent_sift"), three_sifts(cv2.COLOR_RGB2YUV)),
        "dog + hue_sift": (local("dog", "hue_sift"), in_turn(SIFT, SIFT)),
        "fast_hessian + surf": (local("fast_hessian", "surf"), None),
        "fast_hessian + sift": (local("fast_hessian", "sift"), None),
    }


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(settings: dict[str, Any], bare: Bare | None, images: Sequence[Pixels]) -> tuple[float, float, float]:
    """Features per image, seconds per image, and those of bare OpenCV."""
    spec: Any = TypeAdapter(one_of("extractor")).validate_python({**settings, "max_features": NUM_FEATURES})
    extractor = spec.build("cpu", {})
    batches = [ImageBatch(np.zeros(1, np.int64), [image], np.array([image.shape[:2]], np.int32)) for image in images]
    num_features = np.mean([len(extractor.extract(batch).descriptors) for batch in batches])
    ours, theirs = np.full(len(images), np.inf), np.full(len(images), np.inf)
    for _ in range(NUM_ROUNDS):
        for i, (image, batch) in enumerate(zip(images, batches, strict=True)):
            if bare is not None:
                theirs[i] = min(theirs[i], seconds(lambda image=image: bare(image)))
            ours[i] = min(ours[i], seconds(lambda batch=batch: extractor.extract(batch)))
    return float(num_features), float(ours.mean()), float(theirs.mean())


def main() -> None:
    cv2.setNumThreads(1)
    print("| extractor | px | features | images/s | bare OpenCV | ratio |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        images = images_of(size)
        for name, (settings, bare) in contestants().items():
            num_features, ours, theirs = measure(settings, bare, images)
            columns = f"{1 / theirs:.1f} | {theirs / ours:.2f}" if bare is not None else "| "
            print(f"| {name} | {size} | {num_features:.0f} | {1 / ours:.1f} | {columns} |")


if __name__ == "__main__":
    main()
