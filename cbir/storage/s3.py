"""Any S3 server as a store.

Every request has stated time-outs and is tried again by our own loop: boto3's does not cover a body that is cut, stalls
or is damaged on the way, and a hidden retry of a conditional write is refused because of its own first attempt.
"""

import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from cbir.errors import ConfigError, ObjectMissing, StorageError
from cbir.storage.disk import HIDDEN, disk_errors
from cbir.storage.multipart import Upload, content_md5, read_slice
from cbir.storage.ranged import RangedReader
from cbir.storage.retry import S3Settings, answered, attempts
from cbir.storage.s3_errors import S3_ERRORS, code, explained, refused, transient, unauthorised
from cbir.storage.store import ObjectInfo, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["S3Store"]

T = TypeVar("T")
_CONNECTIONS = 32
_BUFFER_BYTES = 256 << 10
_STREAMED_BYTES = 256 << 10
_TRANSFERS = 3  # a byte that was flipped on the way is right the next time


class S3Store(Store):
    """Objects below `s3://bucket/prefix`.

    Endpoint, region and credentials are those of boto3 (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, ...). Where
    a server no longer takes credentials that it took before, they are read again, in case that a file or a process has
    others now, and the request is repeated.

    The tag of an object is its ETag without quotes. `create` and `swap` are single PUTs; where their outcome is unknown
    (no answer, 5xx, a refusal that may be due to our own lost attempt), the object is read and its bytes decide.

    The ETag of an object that was written in one part is mostly its MD5: where a server is seen to do so, whole objects
    are compared with it, because neither HTTP nor boto3 notices a byte that was flipped on the way.
    """

    def __init__(self, uri: str, settings: S3Settings | None = None) -> None:
        self._settings = settings or S3Settings.from_environment()
        self._bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not self._bucket:
            raise ConfigError(f"{uri} names no bucket; use s3://bucket/prefix")
        self._base = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self._bucket}/{prefix}" if prefix else f"s3://{self._bucket}"
        self._client = _client(self.uri, self._settings)
        self._is_accepted = False
        self._renewing = threading.Lock()
        self._quoted = True
        self._bucket_seen = False
        self._tags_are_md5: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.uri, self._settings)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Page by page; leaves out the empty objects with a slash at the end, by which consoles mark folders."""
        last = b""
        for page in self._pages(prefix):
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._base)
                if key.encode() < last:
                    raise StorageError(f"{self.uri}: the server does not list in byte order of the keys; use another")
                last = key.encode()
                marker = key.endswith("/") and found["Size"] == 0
                if key and not marker and not key.rpartition("/")[2].startswith(HIDDEN):
                    yield ObjectInfo(key, found["Size"], found["ETag"].strip('"'))

    def _pages(self, prefix: str) -> Iterator[Any]:
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._base + prefix}
        while True:
            page = self._call("", lambda client: client.list_objects_v2(**request))
            yield page
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, key: str) -> ObjectInfo:
        """The tag is the ETag."""
        where = self._where(key)
        try:
            head = self._call(key, lambda client: client.head_object(**where))
        except ObjectMissing:
            self._see_bucket()
            raise
        return ObjectInfo(key, head["ContentLength"], head["ETag"].strip('"'))

    def _see_bucket(self) -> None:
        # a HEAD does not say whether the key or the whole bucket is missing
        if not self._bucket_seen:
            self._call("", lambda client: client.head_bucket(Bucket=self._bucket))
            self._bucket_seen = True

    def _read(self, key: str, start: int, length: int | None) -> bytes:
        if length == 0:  # a range of nothing cannot be asked for
            self.stat(key)
            return b""
        whole = start == 0 and length is None
        return self._get(key, **({} if whole else {"Range": _range(start, length)}))[0]

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The tag is the ETag."""
        return self._get(key)

    def _get(self, key: str, **extra: str) -> tuple[bytes, str]:
        """The bytes that the request asks for and the ETag."""
        digests: set[str] = set()
        for _ in range(_TRANSFERS):
            data, tag, md5 = self._call(key, partial(self._body, key, {**self._where(key), **extra}))
            if self._is_unharmed(data, md5, digests):
                return data, tag
        raise StorageError(
            f"{self.place(key)}: the bytes that arrive do not have the MD5 that the server announces as their ETag "
            f"({tag}); see the network and the memory of the server, or use https"
        )

    def _is_unharmed(self, data: bytes, md5: str | None, digests: set[str]) -> bool:
        """Whether the bytes have this MD5, or it is no MD5 at all: seen where the same other bytes come twice."""
        if md5 is None or self._tags_are_md5 is False:
            return True
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest == md5:
            self._tags_are_md5 = True
        elif digest in digests and self._tags_are_md5 is None:
            self._tags_are_md5 = False
        digests.add(digest)
        return digest == md5 or self._tags_are_md5 is False

    def _body(self, key: str, request: dict[str, Any], client: "S3Client") -> tuple[bytes, str, str | None]:
        """The bytes, the ETag, and the MD5 of the bytes if the ETag can be that."""
        try:
            response = client.get_object(**request)
        except S3_ERRORS as error:
            if code(error) == "InvalidRange":
                return b"", "", None
            raise
        if "Range" in request and "ContentRange" not in response:
            raise StorageError(f"{self.place(key)}: the server ignores ranges of objects; use another")
        tag = response["ETag"].strip('"')
        with response["Body"] as body:
            data = body.read()  # raises if less arrives than was announced
        return data, tag, tag if "Range" not in request and _may_be_md5(tag, response) else None

    def open(self, key: str) -> BinaryIO:
        """Ranged reads of the state that the object has now, with read-ahead; StorageError if it is replaced."""
        found = self.stat(key)
        fetch = partial(self._block, key, found.tag)
        return io.BufferedReader(RangedReader(fetch, found.size, self._settings.block_bytes), _BUFFER_BYTES)

    def _block(self, key: str, tag: str, start: int, length: int) -> bytes:
        data, _ = self._get(key, Range=_range(start, length), IfMatch=f'"{tag}"')
        if len(data) != length:
            raise StorageError(f"{self.place(key)}: {len(data)} bytes at {start} instead of {length}; run again")
        return data

    def write(self, key: str, data: bytes | Path) -> None:
        """One PUT, or several parts where it is large."""
        size = len(data) if isinstance(data, bytes) else _file_size(data)
        if size > self._settings.part_bytes:
            call: Callable[[Callable[[S3Client], Any]], Any] = partial(self._call, key)
            Upload(call, self._where(key), data, size, self._settings.part_bytes).run()
        else:
            body = data if isinstance(data, bytes) else read_slice(data, 0, size)
            self._call(key, lambda client: self._put(client, key, body))

    def _put(self, client: "S3Client", key: str, data: bytes, **condition: str) -> None:
        # as a file, a body is sent piece by piece and the time-out holds for each; as bytes, for all of it together
        body = data if len(data) <= _STREAMED_BYTES else io.BytesIO(data)
        request: dict[str, Any] = {**self._where(key), "Body": body, "ContentMD5": content_md5(data), **condition}
        client.put_object(**request)

    def create(self, key: str, data: bytes) -> bool:
        """If-None-Match: *."""
        return self._put_if(key, data, None)

    def swap(self, key: str, data: bytes, tag: str) -> bool:
        """If-Match. Whether the server wants the ETag with or without quotes is found out when it refuses."""
        return self._put_if(key, data, tag)

    def _put_if(self, key: str, data: bytes, tag: str | None) -> bool:
        failure: Exception | None = None
        for _ in attempts(self._settings, self._endpoint):
            quoted, client = self._quoted, self._client
            try:
                self._put(client, key, data, **_condition(tag, quoted))
                self._note_acceptance()
                return True
            except S3_ERRORS as error:
                if not (transient(error) or refused(error) or self._has_renewed(client, error)):
                    raise self._explained(error, key) from error
                failure = error
            found, found_tag = self._find(key)
            if found == data:
                return True
            if found_tag != tag:
                return False
            if tag is not None and refused(failure):  # it is as we know it, and still refused: wrong quotes
                self._quoted = not quoted
        assert failure is not None
        raise self._explained(failure, key) from failure

    def _find(self, key: str) -> tuple[bytes | None, str | None]:
        try:
            return self.read_tagged(key)
        except ObjectMissing:
            return None, None

    def delete(self, key: str) -> None:
        """Unconditional."""
        where = self._where(key)
        try:
            self._call(key, lambda client: client.delete_object(**where))
        except ObjectMissing:
            return

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002
        """Never."""
        return None

    def _where(self, key: str) -> dict[str, Any]:
        if not key:
            raise StorageError(f"{self.uri}: an empty key")
        return {"Bucket": self._bucket, "Key": self._base + key}

    def _call(self, key: str, action: "Callable[[S3Client], T]") -> T:
        """The result of an action that may be repeated, tried until it succeeds or cannot."""
        failure: Exception | None = None
        for _ in attempts(self._settings, self._endpoint):
            client = self._client
            try:
                result = action(client)
            except S3_ERRORS as error:
                if refused(error):
                    self._note_acceptance()
                if not (transient(error) or self._has_renewed(client, error)):
                    raise self._explained(error, key) from error
                failure = error
            else:
                self._note_acceptance()
                return result
        assert failure is not None
        raise self._explained(failure, key) from failure

    @property
    def _endpoint(self) -> str:
        return self._client.meta.endpoint_url

    def _note_acceptance(self) -> None:
        self._is_accepted = True
        answered(self._endpoint)

    def _has_renewed(self, client: "S3Client", error: Exception) -> bool:
        """Whether there is a client with credentials that were read after those that this one was refused with."""
        if not unauthorised(error):
            return False
        with self._renewing:
            if self._client is client:
                if not self._is_accepted:
                    return False
                self._client, self._is_accepted = _client(self.uri, self._settings), False
        return True

    def _explained(self, error: Exception, key: str) -> StorageError:
        return explained(error, self.place(key) if key else self.uri, self._endpoint)


def _client(uri: str, settings: S3Settings) -> "S3Client":
    try:
        session = boto3.session.Session()
        client = _new_client(session, settings, "auto")
        # a bucket's name before the host works with Amazon's DNS; elsewhere it belongs into the path
        own = ".amazonaws.com" not in client.meta.endpoint_url
        return _new_client(session, settings, "path") if own else client
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"{uri}: {error}; see AWS_ENDPOINT_URL, AWS_PROFILE and the files in ~/.aws") from error


def _new_client(
    session: boto3.session.Session, settings: S3Settings, addressing: Literal["auto", "path"]
) -> "S3Client":
    config = Config(
        connect_timeout=settings.connect_s,
        read_timeout=settings.read_s,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_CONNECTIONS,
        signature_version="s3v4",
        s3={"addressing_style": addressing},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", config=config)


def _may_be_md5(tag: str, response: Any) -> bool:
    """Not for an object that was written in parts ("...-3") or is encrypted with a key of its owner."""
    own_key = "SSECustomerAlgorithm" in response or "kms" in response.get("ServerSideEncryption", "")
    return re.fullmatch("[0-9a-f]{32}", tag) is not None and not own_key


def _condition(tag: str | None, quoted: bool) -> dict[str, str]:
    if tag is None:
        return {"IfNoneMatch": "*"}
    return {"IfMatch": f'"{tag}"' if quoted else tag}


def _range(start: int, length: int | None) -> str:
    return f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"


def _file_size(path: Path) -> int:
    with disk_errors(str(path)):
        return path.stat().st_size
