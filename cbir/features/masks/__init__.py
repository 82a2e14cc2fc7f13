"""Masks: from decoded images to what of them is wanted. Importing the package registers every mask."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
