"""Credentials that stand in URIs: refused where somebody configures them, blotted out where a library repeats them."""

import re

from cbir.errors import ConfigError

__all__ = ["redacted", "refuse_credentials"]

_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_SIGNED = re.compile(r"\b((?:X-Amz-)?(?:Credential|Security-Token|Signature)|AWSAccessKeyId)=[^&\s'\"]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """The text without the users and passwords, and the signatures, of the URIs in it."""
    return _SIGNED.sub(r"\1=***", _USER.sub("***@", text))


def refuse_credentials(uri: str) -> None:
    """ConfigError for a URI that holds credentials: it would be written into manifests, reports and logs."""
    if (found := redacted(uri)) != uri:
        raise ConfigError(
            f"{found} holds credentials, which would be written into manifests and logs: take them out, and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
