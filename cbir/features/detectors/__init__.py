"""Detectors: from pixels to keypoints. Importing the package registers every detector."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
