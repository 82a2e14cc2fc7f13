"""From decoded images to the features of a channel: the extractor's, without what a mask drops, with regions."""

from dataclasses import dataclass, replace

from cbir.features.extractor import Extractor
from cbir.features.masks.mask import Masker, drop_masked
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
        features = replace(self.extractor.extract(batch), sizes=batch.sizes)
        if self.masker is not None:
            features = drop_masked(features, self.masker.masks(batch), self.threshold)
        return features if self.proposer is None else replace(features, regions=self.proposer.propose(batch))
