"""From decoded images to the boxes of a torchvision detector."""

from pathlib import Path
from typing import Any

import numpy as np
from torchvision.models import detection

from cbir.features.networks.vision import create, exactly, pixels_on
from cbir.features.regions.detector import Detector
from cbir.features.regions.proposer import in_original_pixels, regions_of, with_whole
from cbir.types import Array, Floats, ImageBatch, Int32s, Pixels, Regions

__all__ = ["DetectorProposer"]


class DetectorProposer:
    """A detection network on a device; images pass one by one, so that none depends on its neighbours."""

    def __init__(self, spec: Detector, weights: Path | None, device: str) -> None:
        self._spec, self._device = spec, device
        self._network = create(spec, detection, weights, device)
        heads: Any = getattr(self._network, "roi_heads", self._network)
        heads.score_thresh = spec.score  # torchvision's own may be higher (FCOS: 0.2)

    def propose(self, batch: ImageBatch) -> Regions:
        """The whole image and the detections by falling score."""
        return regions_of([self._of(*pair) for pair in zip(batch.images, batch.sizes, strict=True)])

    def _of(self, image: Pixels, size: Int32s) -> Floats:
        return with_whole(in_original_pixels(self._detected(image), image.shape, size), size)

    def _detected(self, image: Pixels) -> Array:
        """Boxes (R, 4) in pixels of the decoded image, chosen by score and class."""
        spec = self._spec
        with exactly():
            found = self._network([pixels_on(self._device, image)])[0]
        boxes, scores, labels = (found[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
        kept = scores >= spec.score
        if spec.classes is not None:
            kept &= np.isin(labels, spec.classes)
        order = np.lexsort((*boxes[kept].T, -scores[kept]))
        return np.asarray(boxes[kept][order[: spec.max_boxes]], np.float32)
