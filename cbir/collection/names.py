"""What the name of an object, or of a tar's member, says about its content."""

import re

from cbir.collection.shard import Kind
from cbir.errors import DataError

__all__ = ["is_image", "kind_of", "refuse_compressed"]

SIDECAR = re.compile(
    r"""
    (
      \. ( csv | json | jsonl | ndjson | toml | tsv | xml | ya?ml )
    | \. ( cls | htm | html | ini | log | md | md5 | pdf | rst | sha1 | sha256 | text | txt )
    | \. ( arrow | feather | h5 | hdf5 | mat | npy | npz | pickle | pkl | pt | pth | safetensors )
    | \. ( db | idx | index | js | css | lock | py | sh | sqlite | tmp )
    | \. ( 7z | bz2 | gz | rar | xz | zip | zst )
    | (^|/) ( _SUCCESS | _metadata | _common_metadata | LICENSE | Makefile | README )
    ) \Z
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Names of files that lie beside images. Anything else counts as an image, so that one of an unknown kind is
quarantined later and not lost unseen."""

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z")


HIDDEN = re.compile(r"(^|/)\.(?!\.?(/|\Z))")


def is_hidden(name: str) -> bool:
    """Whether a part of the path, but `.` and `..`, starts with a dot, or the name is the mark of an empty folder."""
    return name.endswith("/") or HIDDEN.search(name) is not None


def is_image(name: str) -> bool:
    """Whether the name is neither hidden nor that of a well-known sidecar."""
    return not (is_hidden(name) or SIDECAR.search(name))


def kind_of(name: str) -> Kind | None:
    """What to read an object as, None to leave it out; a compressed tar is a "tar" that `refuse_compressed` refuses."""
    lower = name.lower()
    if is_hidden(name):
        return None
    if lower.endswith((".tar", *COMPRESSED_TARS)):
        return "tar"
    if lower.endswith(".parquet"):
        return "parquet"
    return "files" if is_image(name) else None


def refuse_compressed(uri: str) -> None:
    """DataError for a compressed tar, in which no image can be reached without unpacking all that lies before it."""
    if uri.lower().endswith(COMPRESSED_TARS):
        raise DataError(
            f"{uri} is a compressed tar, which cannot be read at an offset: unpack it or repack it as a plain .tar "
            f"(image files hardly compress), or choose another `input.format` to leave it out"
        )
