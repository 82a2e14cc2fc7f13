"""Extractors: from decoded images to features. Importing the package registers every extractor and pooling."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
