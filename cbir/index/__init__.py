"""Indexes: searchable structures over encoded features. Importing the package registers every index."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
