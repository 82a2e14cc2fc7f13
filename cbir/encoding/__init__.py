"""Encoders: codebooks, aggregation, normalisation and projection of features.

Importing the package registers every encoder.
"""

from cbir.spec import import_methods

import_methods(__name__, __path__)
