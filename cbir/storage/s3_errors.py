"""What the errors of an S3 client mean: whether to try again, and what to tell the user."""

from typing import Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ResponseStreamingError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as UnreachableError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError, ProtocolError

from cbir.errors import ObjectMissing, StorageError, UnsafeStore
from cbir.storage.credentials import redacted

__all__ = ["S3_ERRORS", "code", "explained", "refused", "transient", "unauthorised"]

S3_ERRORS: Final = (BotoCoreError, ClientError, HTTPError, ResponseParserError)
"""All that a call of the client may raise."""

_CONNECTION = (UnreachableError, HTTPClientError, HTTPError)
_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
_BROKEN_TRANSFER = (IncompleteReadError, ProtocolError, ResponseParserError, ResponseStreamingError)
_TRANSIENT = {
    "BadDigest", "IncompleteBody", "RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "OperationAborted", "NoSuchKey", "404", "409", "412"}
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}


def code(error: Exception) -> str:
    """The server's error code ("NoSuchKey"), or "" where the server did not answer."""
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""


def _status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def transient(error: Exception) -> bool:
    """Whether the same request may succeed a moment later; whether it was applied is not known."""
    if isinstance(error, ClientError):
        if code(error) in _FULL or _status(error) == 501:
            return False
        return code(error) in _TRANSIENT or _status(error) >= 500 or _status(error) == 429
    return isinstance(error, _CONNECTION + _BROKEN_TRANSFER)


def refused(error: Exception) -> bool:
    """Whether the server says that the condition of a write did not hold."""
    return code(error) in _REFUSED


def unauthorised(error: Exception) -> bool:
    """Whether other credentials may help; servers do not tell well between expired, revoked and insufficient ones."""
    if isinstance(error, ClientError):
        return code(error) in _BAD_CREDENTIALS or _status(error) in (401, 403)
    return isinstance(error, _NO_CREDENTIALS)


def explained(error: Exception, place: str, endpoint: str) -> StorageError:
    """The error that the user sees: the URI, what happened, and what to do; without a password in the endpoint."""
    found = _explained(error, place, endpoint)
    return type(found)(redacted(str(found)))


def _explained(error: Exception, place: str, endpoint: str) -> StorageError:
    if isinstance(error, ClientError):
        return _answered(error, place, endpoint)
    if isinstance(error, _NO_CREDENTIALS):
        return StorageError(
            f"{place}: no usable credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the machine a role"
        )
    if isinstance(error, _BROKEN_TRANSFER):
        return StorageError(f"{place}: the answers of {endpoint} break off ({error}); see the network and the server")
    if isinstance(error, _CONNECTION):
        return StorageError(
            f"{place}: no answer from {endpoint} ({type(error).__name__}: {error}); see whether the server runs and "
            "can be reached from here, and what AWS_ENDPOINT_URL says"
        )
    if isinstance(error, ParamValidationError):
        return StorageError(f"{place}: not a possible bucket or key ({error}); correct the URI")
    return StorageError(f"{place}: the answers of {endpoint} cannot be used ({error}); is it an S3 server?")


def _answered(error: ClientError, place: str, endpoint: str) -> StorageError:
    name, status = code(error), _status(error)
    message = error.response.get("Error", {}).get("Message") or "no message"
    said = f"{endpoint} answered {status} {name} ({message})"
    if name == "NoSuchBucket" or (error.operation_name == "HeadBucket" and status == 404):
        return StorageError(f"{place}: the bucket does not exist at {endpoint}; create it or correct the URI")
    if status == 404 and error.operation_name in ("HeadObject", "GetObject"):  # also where the body got lost
        return ObjectMissing(f"{place}: no such object")
    if name in _BAD_CREDENTIALS:
        return StorageError(f"{place}: {said}; the credentials are wrong or expired, see AWS_ACCESS_KEY_ID, "
                            "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_PROFILE")  # fmt: skip
    if name in _FULL or status == 507:
        return StorageError(f"{place}: {said}; the store is full, free some space or raise the quota, and run again")
    if status in (401, 403):
        or_worse = "are wrong or expired, or " if name == "403" else ""  # the answer to a HEAD says no more
        return StorageError(f"{place}: {said}; these credentials {or_worse}may not do this, allow s3:ListBucket, "
                            "s3:GetObject, s3:PutObject and s3:DeleteObject, or use others")  # fmt: skip
    return _rare(name, status, place, said)


def _rare(name: str, status: int, place: str, said: str) -> StorageError:
    if status == 412:
        return StorageError(f"{place}: {said}; the object was replaced while it was read, run again")
    if status == 501:
        return UnsafeStore(f"{place}: {said}; the server lacks what is needed, use one with conditional PUT")
    if name in _ELSEWHERE:
        return StorageError(f"{place}: {said}; the bucket lies in another region, set AWS_DEFAULT_REGION")
    if name == "RequestTimeTooSkewed":
        return StorageError(f"{place}: {said}; set this machine's clock")
    if status >= 500 or status == 429:
        return StorageError(f"{place}: {said}, again and again; wait until the server is well and run again")
    return StorageError(f"{place}: {said}; see the server's log")
