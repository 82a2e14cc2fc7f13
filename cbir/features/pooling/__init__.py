"""Poolings: from feature maps to one vector per image. Importing the package registers every pooling."""

from cbir.spec import import_methods

import_methods(__name__, __path__)

from cbir.features.pooling.gem import GeM  # noqa: E402 - as above: every module first, in alphabetical order
from cbir.features.pooling.pooling import Pooling, PoolingSpec  # noqa: E402

__all__ = ["GeM", "Pooling", "PoolingSpec"]
