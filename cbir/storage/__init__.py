"""Object storage: one `Store` interface over local folders and S3.

open_store("s3://bucket/prefix")    any S3 server; the endpoint and credentials come from the usual AWS settings
open_store("file:///data/index")    a local folder; so does a plain path
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from cbir.errors import ConfigError
from cbir.storage.credentials import refuse_credentials
from cbir.storage.disk import DISK_FULL
from cbir.storage.local import LocalStore
from cbir.storage.retry import S3Settings
from cbir.storage.store import ObjectInfo, Store

__all__ = ["DISK_FULL", "ObjectInfo", "S3Settings", "Store", "open_store"]


def open_store(uri: str, settings: S3Settings | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `file:///absolute/path` or a plain path; nothing is created or asked yet.

    `settings` are for S3 and come from the environment where they are not given. ConfigError for any other URI, and for
    credentials in it.
    """
    refuse_credentials(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not uri:
            raise ConfigError("the URI of a store is empty; use s3://bucket/prefix, file:///absolute/path or a path")
        return LocalStore(Path(uri))
    if scheme == "s3":
        from cbir.storage.s3 import S3Store  # boto3 takes long to import and local stores do without it

        return S3Store(uri, settings)
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(Path(unquote(urlsplit(uri).path)))
    raise ConfigError(f"{uri} is no store; use s3://bucket/prefix, file:///absolute/path or a path")
