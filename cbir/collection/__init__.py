"""The image collection: from the places that `images` names to shards of work, and from a shard to the bytes of images.

list_shards(images, spec) -> ImageShard ...     streamed, nothing but listings and Parquet footers is read
read_images(shard, spec, max_bytes) -> RawImage ...
read_place(source, place, spec) -> bytes        one image again, by where it lies
read_vectors(shard, spec, dim, dtype) -> VectorRows ...     of Parquet files of vectors that were made elsewhere
"""

from cbir.collection.listing import list_shards
from cbir.collection.reading import read_images, read_place
from cbir.collection.shard import ImageShard, InputSpec, Place, RawImage
from cbir.collection.vectors import VectorRows, read_vectors

__all__ = [
    "ImageShard",
    "InputSpec",
    "Place",
    "RawImage",
    "VectorRows",
    "list_shards",
    "read_images",
    "read_place",
    "read_vectors",
]
