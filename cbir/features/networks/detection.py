"""From decoded images to the boxes of a torchvision detector, or of its region proposal network alone."""

from pathlib import Path
from typing import Any

import numpy as np
from torchvision.models import detection

from cbir.errors import ConfigError
from cbir.features.networks.vision import create, exactly, pixels_on
from cbir.features.regions.detector import Detector
from cbir.features.regions.proposer import in_original_pixels, regions_of, with_whole
from cbir.features.regions.rpn import Rpn
from cbir.types import Array, Floats, ImageBatch, Int32s, Pixels, Regions

__all__ = ["DetectorProposer", "RpnProposer"]

PER_SIZE = 1000
"""How many of the best anchors of one size are looked at before suppression, unless more boxes are wanted."""


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


class RpnProposer:
    """The region proposal network of a Faster R-CNN on a device; images pass one by one."""

    def __init__(self, spec: Rpn, weights: Path | None, device: str) -> None:
        self._spec, self._device = spec, device
        self._network: Any = create(_with_own_limits(spec), detection, weights, device)

    def propose(self, batch: ImageBatch) -> Regions:
        """The whole image, if asked for, and the boxes by falling objectness."""
        return regions_of([self._of(*pair) for pair in zip(batch.images, batch.sizes, strict=True)])

    def _of(self, image: Pixels, size: Int32s) -> Floats:
        with exactly():
            seen, _ = self._network.transform([pixels_on(self._device, image)])
            found, _ = self._network.rpn(seen, self._network.backbone(seen.tensors))
            boxes = found[0].cpu().numpy()
        return with_whole(in_original_pixels(boxes, seen.image_sizes[0], size), size, first=self._spec.whole)


def _with_own_limits(spec: Rpn) -> Rpn:
    """The same with its limits as arguments of the model; ConfigError for a model that takes none such."""
    if "rcnn" not in spec.model:
        raise ConfigError(
            f"proposer.model: {spec.model} has no region proposal network; choose a Faster R-CNN such as "
            "fasterrcnn_resnet50_fpn, or use {name: detector}"
        )
    limits = {
        "rpn_score_thresh": spec.score,
        "rpn_nms_thresh": spec.iou,
        "rpn_pre_nms_top_n_test": max(PER_SIZE, spec.max_boxes),
        "rpn_post_nms_top_n_test": spec.max_boxes,
    }
    return spec.model_copy(update={"model_args": {**spec.model_args, **limits}})
