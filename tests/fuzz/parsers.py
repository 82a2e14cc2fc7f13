"""Every parser of files that strangers make, as a function of bytes that may raise nothing but a CbirError.

`SEEDS` are whole files of each kind, for mutation.
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cbir.artifacts import Done
from cbir.collection import InputSpec, list_shards, read_images, read_vectors
from cbir.config import load_config
from cbir.evaluation.ground_truth import read_ground_truth
from cbir.versions import Manifest
from tests.collection_forms import IMAGES, tar_bytes

__all__ = ["PARSERS", "SEEDS"]

MAX_BYTES = 1 << 20
VECTORS = InputSpec(format="vectors")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cbir-fuzz-")


def _file(name: str, data: bytes) -> Path:
    path = Path(_folder().name) / name
    path.write_bytes(data)
    return path


def _images(name: str, data: bytes) -> None:
    spec = InputSpec()
    for shard in list_shards([str(_file(name, data))], spec):
        for image in read_images(shard, spec, MAX_BYTES):
            assert image.key
            image.key.encode()


def _tar(data: bytes) -> None:
    _images("images.tar", data)


def _parquet(data: bytes) -> None:
    _images("images.parquet", data)


def _vectors(data: bytes) -> None:
    for shard in list_shards([str(_file("vectors.parquet", data))], VECTORS):
        for rows in read_vectors(shard, VECTORS, 4, "float32"):
            assert rows.vectors.shape == (len(rows.keys), 4)


def _truth_csv(data: bytes) -> None:
    read_ground_truth(_file("truth.csv", data))


def _truth_json(data: bytes) -> None:
    read_ground_truth(_file("truth.json", data))


def _config(data: bytes) -> None:
    load_config(_file("config.yaml", data))


def _manifest(data: bytes) -> None:
    Manifest.from_json(data, "versions/1.json")


def _done(data: bytes) -> None:
    Done.from_json(data, "DONE.json")


PARSERS: dict[str, Callable[[bytes], None]] = {
    "tar": _tar,
    "parquet": _parquet,
    "vectors": _vectors,
    "truth_csv": _truth_csv,
    "truth_json": _truth_json,
    "config": _config,
    "manifest": _manifest,
    "done": _done,
}


def _parquet_bytes(**columns: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def _yaml_bytes(**settings: object) -> bytes:
    return yaml.safe_dump(settings).encode()


_CHANNEL = {
    "extractor": {"name": "sift", "max_features": 60},
    "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 8}],
    "index": {"name": "ivfpq", "lists": 2, "opq": True},
}
_FILE = {"role": "ids", "key": "stages/merge/x/part-y.arrow", "num_bytes": 7, "sha256": "0" * 64}
_RECORD = {"files": [_FILE], "counts": {"images": 2, "indexed": 1}}

SEEDS: dict[str, list[bytes]] = {
    "tar": [tar_bytes(IMAGES, form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)],
    "parquet": [
        _parquet_bytes(key=list(IMAGES), image=list(IMAGES.values())),
        _parquet_bytes(key=[1, 2], image=[{"bytes": b"1", "path": "a"}, None]),
    ],
    "vectors": [
        _parquet_bytes(key=["a", "b"], vector=[[1.0, 2.0, 3.0, 4.0], None]),
        _parquet_bytes(key=["a", "b"], vector=[bytes(16), b"short"]),
    ],
    "truth_csv": [
        b"image,instance_id,role,box\na.jpg,1,both,\nb.jpg,1;2,query,1 2 3 4\nc.jpg,none,distractor,\n",
        b'image,instance_id,role,x,y,w,h\n"a\n.jpg",1,database,,,,\nb.jpg,1,query,1,2,3,4\n',
    ],
    "truth_json": [
        json.dumps(
            {
                "imlist": ["a", "b", "c"],
                "qimlist": ["a"],
                "gnd": [{"bbx": [1, 2, 3, 4], "easy": [1], "hard": [2], "junk": []}],
            }
        ).encode()
    ],
    "config": [
        _yaml_bytes(images=["a", "s3://b/c"], store="d", channels={"local": _CHANNEL}, search={"depth": 5}),
        b"a: &a [1, 2]\nimages: *a\n<<: {store: x}\ndate: 2026-01-01\nnumber: 0x1f\n",
    ],
    "manifest": [
        json.dumps(
            {"format": 1, "version": 1, "content": "x", "config": {}, "layout": {}, "work": ["a/"], **_RECORD}
        ).encode()
    ],
    "done": [json.dumps({"stage": "merge", "fingerprint": "x", "facts": {}, **_RECORD}).encode()],
}
