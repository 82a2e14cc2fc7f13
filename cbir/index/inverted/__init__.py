"""Inverted files: matching kernels over sets of local features. Importing the package registers every method."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
