"""The nouns of a collection: how it is read, a shard of it, one image and the place where that lies."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal

from pydantic import PositiveInt

from cbir.spec import Spec, fingerprint
from cbir.storage import ObjectInfo

__all__ = ["ImageShard", "InputSpec", "Kind", "Place", "RawImage"]

Kind = Literal["tar", "parquet", "files", "vectors"]


class InputSpec(Spec):
    """How the objects under `images` become images with keys.

    `auto` judges every object by its extension: `.tar`, `.parquet`, anything else is one image; hidden objects and
    well-known sidecars (.json, .txt, .csv, ...) are left out. `tar`, `parquet` and `files` take only objects of that
    kind out of a folder; an object that `images` names itself is read as the format says, whatever its extension.

    A key is the name of a tar's member, the text or integer in the key column of a Parquet file, or the path of a file
    relative to its entry in `images`. `key_column` and `image_column` may name a field of a struct ("image.path");
    an image column that is itself a struct with a field `bytes` (Hugging Face) is understood.

    `vectors` takes Parquet files too, of a key column and a column of vectors that were made elsewhere, for the
    extractor of this name.

    `shard_images` is the mean number of files per shard of a folder.
    """

    format: Literal["auto", "tar", "parquet", "files", "vectors"] = "auto"
    key_column: str = "key"
    image_column: str = "image"
    vector_column: str = "vector"
    shard_images: PositiveInt = 256

    def columns(self, kind: Kind) -> tuple[str, ...]:
        """The columns that are read of objects of this kind."""
        other = {"parquet": self.image_column, "vectors": self.vector_column}.get(kind)
        return () if other is None else (self.key_column, other)


@dataclass(frozen=True)
class ImageShard:
    """A piece of work: one tar, one Parquet file, or a group of image files that are neighbours in key order.

    `source` is the entry of `images` that it was listed from, `root` the URI of the store that its `objects` lie in;
    `columns` are those of a Parquet file, else empty; `num_images` is None where only reading tells (tar).
    """

    name: str
    kind: Kind
    source: str
    root: str
    objects: tuple[ObjectInfo, ...]
    columns: tuple[str, ...] = ()
    num_images: int | None = None
    content: str = ""
    """What identifies its images where they were found to be others than size and tags of the objects tell."""

    @property
    def fingerprint(self) -> str:
        """Changes with the content, and not when the whole collection moves to another root."""
        listed = self.kind, [astuple(info) for info in self.objects], self.columns
        return fingerprint("image shard", *listed, *([self.content] if self.content else []))

    @property
    def identity(self) -> tuple[str, str, str]:
        """What two shards of different listings have in common if nothing changed."""
        return self.source, self.name, self.fingerprint

    @property
    def num_bytes(self) -> int:
        """Bytes of all its objects."""
        return sum(info.size for info in self.objects)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; objects are rows of key, size and tag."""
        return {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "root": self.root,
            "objects": [list(astuple(info)) for info in self.objects],
            "columns": list(self.columns),
            "num_images": self.num_images,
            "content": self.content,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ImageShard":
        """Back from `to_json`."""
        objects = tuple(ObjectInfo(*row) for row in record["objects"])
        return cls(**{**record, "objects": objects, "columns": tuple(record["columns"])})


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an image lie under its root; four plain columns, for a table: `Place(*columns)`.

    `start` is the offset of the first byte in a tar, the row in a Parquet file, 0 for a file; `size` in bytes.
    """

    kind: Kind
    object: str
    start: int
    size: int

    def describe(self, source: str, key: str) -> str:
        """For people: `s3://b/x.tar: member a/b.jpg (offset 1234)`; `source` is as in `read_place`."""
        source = source.rstrip("/")
        uri = source if source.endswith(f"/{self.object}") else f"{source}/{self.object}"
        match self.kind:
            case "tar":
                return f"{uri}: member {key} (offset {self.start})"
            case "parquet" | "vectors":
                return f"{uri}: row {self.start}"
            case "files":
                return uri


@dataclass(frozen=True, slots=True)
class RawImage:
    """The undecoded bytes of one image; `data` is None where they were skipped, being more than the limit.

    `place` is for people, `at` is for `read_place`.
    """

    key: str
    place: str
    at: Place
    data: bytes | None

    @property
    def size(self) -> int:
        """Bytes, also of a skipped image."""
        return self.at.size
