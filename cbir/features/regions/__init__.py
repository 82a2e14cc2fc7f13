"""Region proposers: from decoded images to boxes. Importing the package registers every proposer."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
