"""Local features of real photographs for benchmarks, found through CBIR_TEST_DATA."""

import os
from pathlib import Path

import numpy as np

from cbir.collection import InputSpec, list_shards, read_images
from cbir.encoding.rootsift import RootSift
from cbir.features.sift import Sift
from cbir.images import Decoded, Limits, decode
from cbir.types import FeatureBatch, ImageBatch, image_id

DATA = Path(os.environ.get("CBIR_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def root_sift(names: tuple[str, ...]) -> FeatureBatch | None:
    """RootSIFT of the photographs of some sets."""
    if not (DATA / "photos").is_dir():
        return None
    extractor, batches = Sift().build("cpu", {}), []
    for name in names:
        for shard in list_shards((str(DATA / "photos" / name / "images"),), InputSpec()):
            for raw in read_images(shard, InputSpec(), 1 << 30):
                image = decode(raw.data or b"", Sift().view, Limits())
                if isinstance(image, Decoded):
                    ids, sizes = np.array([image_id(raw.key)]), np.array([image.size], np.int32)
                    batches.append(extractor.extract(ImageBatch(ids, [image.pixels], sizes)))
    return RootSift().restore({}).encode(FeatureBatch.concatenate(batches))
