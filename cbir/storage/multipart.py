"""Large objects are written in parts, several at a time."""

import base64
import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from cbir.errors import StorageError
from cbir.storage.disk import disk_errors
from cbir.storage.s3_errors import code

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

__all__ = ["Upload", "content_md5", "read_slice"]

_MOST_PARTS = 10_000
_THREADS = 4


@dataclass(frozen=True)
class Upload:
    """`size` bytes on their way to one object.

    `where` names bucket and key; `call` runs a request with a client until it succeeds or raises. The object appears
    with the last request; what was sent of a failed upload is taken back.
    """

    call: "Callable[[Callable[[S3Client], Any]], Any]"
    where: dict[str, Any]
    data: bytes | Path
    size: int
    part_bytes: int

    def run(self) -> None:
        """Send everything, as long as it takes."""
        started = self.call(lambda client: client.create_multipart_upload(**self.where))
        target = {**self.where, "UploadId": started["UploadId"]}
        try:
            parts = self._send_parts(target)
            self.call(partial(self._complete, target, parts))
        except BaseException:
            with contextlib.suppress(StorageError):
                self.call(lambda client: client.abort_multipart_upload(**target))
            raise

    def _send_parts(self, target: dict[str, Any]) -> "list[CompletedPartTypeDef]":
        part_bytes = max(self.part_bytes, -(-self.size // _MOST_PARTS))
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="cbir-upload")
        try:
            return list(threads.map(partial(self._send_part, target, part_bytes), range(-(-self.size // part_bytes))))
        finally:
            threads.shutdown(cancel_futures=True)

    def _send_part(self, target: dict[str, Any], part_bytes: int, index: int) -> "CompletedPartTypeDef":
        body = read_slice(self.data, index * part_bytes, part_bytes)
        request = {**target, "PartNumber": index + 1, "ContentMD5": content_md5(body)}
        sent = self.call(lambda client: client.upload_part(**request, Body=io.BytesIO(body)))
        return {"ETag": sent["ETag"], "PartNumber": index + 1}

    def _complete(self, target: dict[str, Any], parts: "Sequence[CompletedPartTypeDef]", client: "S3Client") -> None:
        try:
            client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # the upload is gone if an earlier attempt succeeded and its answer was lost
            if code(error) != "NoSuchUpload" or not self._is_there(client):
                raise

    def _is_there(self, client: "S3Client") -> bool:
        try:
            return client.head_object(**self.where)["ContentLength"] == self.size
        except ClientError:
            return False


def read_slice(data: bytes | Path, start: int, length: int) -> bytes:
    """Bytes `start` to `start + length`, cut at the end, of bytes or of a file."""
    if isinstance(data, bytes):
        return data[start : start + length]
    with disk_errors(str(data)), data.open("rb") as file:
        file.seek(start)
        return file.read(length)


def content_md5(data: bytes) -> str:
    """The header by which every S3 server checks what arrived."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
