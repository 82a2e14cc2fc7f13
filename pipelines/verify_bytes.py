"""Stage `verify bytes`: read images that a listing calls unchanged, and compare their bytes with those indexed.

Size and tag of an object tell nearly always whether it changed. A file that was changed in place with its time set
back, or a bucket that was restored over with its tags, is found only so.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cbir.artifacts import Done
from cbir.collection import ImageShard, InputSpec, read_images
from cbir.images import Limits
from cbir.spec import fingerprint
from cbir.types import image_id
from pipelines.known import digests_of
from pipelines.tables import open_parquet
from pipelines.work import Task, Worker

__all__ = ["VerifyBytesTask"]


@dataclass(frozen=True)
class VerifyBytesTask(Task):
    """Read one shard again. `content`, a fact of the record, identifies the bytes of its images; it is "" if they are
    those that its features were made of.

    An image that could not be used then is not compared.
    """

    stage: ClassVar[str] = "verify bytes"
    shard: ImageShard
    input: InputSpec
    limits: Limits
    features: Done

    @classmethod
    def of(cls, shard: ImageShard, spec: InputSpec, limits: Limits, features: Done, run: str) -> "VerifyBytesTask":
        """The task of one shard in one run; in the next run it is done again."""
        identity = fingerprint("verify bytes", run, shard.identity, features.fingerprint)
        return cls(shard.name, identity, shard, spec, limits, features)

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return self.shard.num_bytes

    def run(self, worker: Worker) -> Done:
        """Hash every image."""
        table = open_parquet(worker.store, self.features.file("features")).read(["image_id", "content_sha256"])
        known = dict(zip(table.column("image_id").to_pylist(), digests_of(table).tolist(), strict=True))
        everything, is_same = hashlib.sha256(), True
        with worker.timer.phase("read"):
            for raw in read_images(self.shard, self.input, int(self.limits.megabytes * 1e6)):
                digest = np.bytes_(hashlib.sha256(raw.data or b"").digest())
                is_same &= known.get(image_id(raw.key), digest) == digest
                everything.update(raw.key.encode() + b"\0" + digest)
        facts = {"content": "" if is_same else everything.hexdigest()}
        return self.finish(worker, [], {"images": len(known)}, facts)
