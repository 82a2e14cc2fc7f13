"""From decoded images to the features of a channel: the extractor's, of what a mask wants, with regions."""

import sys
from dataclasses import dataclass, replace

from cbir.errors import DataError
from cbir.features.extractor import Extractor, MaskedExtractor
from cbir.features.masks.mask import Masker, drop_masked, usable_masks
from cbir.features.regions.proposer import Proposer
from cbir.types import FeatureBatch, ImageBatch

__all__ = ["Describer"]


@dataclass(frozen=True)
class Describer:
    """A working extractor, with a mask and its threshold and a proposer where there are."""

    extractor: Extractor
    masker: Masker | None = None
    threshold: float = 0.0
    proposer: Proposer | None = None

    def describe(self, batch: ImageBatch) -> FeatureBatch:
        """The features of every image, with the sizes of the originals; `regions` are None without a proposer.

        Images that do not fit into memory together are described in halves, which changes nothing but the time, as no
        image's features depend on its neighbours. DataError for an image that does not even fit alone.
        """
        features = self._described_in_memory(batch)
        if features is not None:
            return features
        if len(batch) == 1:
            raise DataError(_does_not_fit(batch))
        half = len(batch) // 2
        parts = (_images(batch, slice(half)), _images(batch, slice(half, None)))
        return FeatureBatch.concatenate([self.describe(part) for part in parts])

    def _described_in_memory(self, batch: ImageBatch) -> FeatureBatch | None:
        """None where memory does not suffice; what the attempt held is free by then, as its traceback is gone."""
        try:
            return self._described(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return None

    def _described(self, batch: ImageBatch) -> FeatureBatch:
        features = replace(self._extracted(batch), sizes=batch.sizes)
        return features if self.proposer is None else replace(features, regions=self.proposer.propose(batch))

    def _extracted(self, batch: ImageBatch) -> FeatureBatch:
        if self.masker is None:
            return self.extractor.extract(batch)
        masks = self.masker.masks(batch)
        if isinstance(self.extractor, MaskedExtractor):
            return self.extractor.extract_masked(batch, usable_masks(batch.image_ids, masks, self.threshold))
        features = replace(self.extractor.extract(batch), sizes=batch.sizes)
        return drop_masked(features, masks, self.threshold)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # whoever raises its error has imported it
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _images(batch: ImageBatch, some: slice) -> ImageBatch:
    return ImageBatch(batch.image_ids[some], batch.images[some], batch.sizes[some])


def _does_not_fit(batch: ImageBatch) -> str:
    height, width = batch.images[0].shape[:2]
    return (
        f"the image with the id {batch.image_ids[0]}, {width} x {height} pixels as it is described, does not fit into "
        "memory even alone: give its extractor a smaller size or fewer scales, or run fewer workers on the device"
    )
