"""Rerankers and fusion: what happens to hits after the index. Importing the package registers all of them."""

from cbir.spec import import_methods

import_methods(__name__, __path__)
