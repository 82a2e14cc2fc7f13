"""Descriptors: from keypoints to rows. Importing the package registers every descriptor."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
