"""cbir: a distributed batch indexing pipeline for instance-level image retrieval.

import cbir
results = cbir.open("s3://indexes/landmarks").search("picture.jpg")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbir.search import Searcher

__all__ = ["open"]


def open(uri: str, version: int | None = None) -> "Searcher":
    """Open the current (or the given) version of an index for search in this process."""
    # Imported here so that `import cbir.spec` and the command line's help stay fast.
    from cbir.search import open_version

    return open_version(uri, version)
