"""Small collections in every form, for the tests of `cbir.collection`."""

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cbir.collection import ImageShard, InputSpec, RawImage, list_shards, read_images
from cbir.errors import DataError

LIMIT = 1 << 20
SPEC = InputSpec()

IMAGES = {
    "a.jpg": b"first image",
    "deep/er/and deeper/b c.png": bytes(range(256)) * 7,
    "empty.jpg": b"",
    "sub/Größe 東京.webp": b"unicode",
    "sub/block.jpg": b"x" * 512,
    "without extension": b"no extension",
    f"long/{'n' * 90}/{'m' * 120}.jpg": b"long name",
}


def write_files(folder: Path, images: Mapping[str, bytes]) -> Path:
    for key, data in images.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar_bytes(images: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for key, data in images.items():
            member = tarfile.TarInfo(key)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_tar(path: Path, images: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.write_bytes(tar_bytes(images, form))
    return path


def write_parquet(path: Path, images: Mapping[str, bytes], **options: object) -> Path:
    pq.write_table(pa.table({"key": list(images), "image": list(images.values())}), path, **options)
    return path


def shards_of(*uris: Path | str, spec: InputSpec = SPEC) -> list[ImageShard]:
    return list(list_shards([str(uri) for uri in uris], spec))


def images_of(*uris: Path | str, spec: InputSpec = SPEC, limit: int = LIMIT) -> list[RawImage]:
    return [image for shard in shards_of(*uris, spec=spec) for image in read_images(shard, spec, limit)]


def content(images: list[RawImage]) -> dict[str, bytes | None]:
    assert len({image.key for image in images}) == len(images)
    return {image.key: image.data for image in images}


def read_until_error(images: Iterator[RawImage]) -> tuple[list[str], str]:
    """The keys that come before the DataError, and its message."""
    keys: list[str] = []
    try:
        keys.extend(image.key for image in images)
    except DataError as error:
        return keys, str(error)
    raise AssertionError(f"no error after {keys}")


Writer = Callable[[Path, Mapping[str, bytes]], Path]

FORMS: dict[str, Writer] = {
    "folder": lambda path, images: write_files(path / "photos", images),
    "gnu tar": lambda path, images: write_tar(path / "x.tar", images, tarfile.GNU_FORMAT),
    "pax tar": lambda path, images: write_tar(path / "x.tar", images, tarfile.PAX_FORMAT),
    "parquet": lambda path, images: write_parquet(path / "x.parquet", images),
    "parquet of many row groups": lambda path, images: write_parquet(path / "x.parquet", images, row_group_size=2),
}
