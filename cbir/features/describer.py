"""From decoded images to the features of a channel: the extractor's, of what a mask wants, with regions."""

from dataclasses import dataclass, replace

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
        """The features of every image, with the sizes of the originals; `regions` are None without a proposer."""
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
