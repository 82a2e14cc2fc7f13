"""The error tree of cbir.

    CbirError            everything that cbir raises on purpose
    ├── ConfigError      the YAML asks for something that does not exist or cannot work
    ├── DataError        the images, their keys or the features made of them cannot be used as asked
    ├── ArtifactError    a stored file, record or version is missing, incomplete or not what its record says
    ├── LeaseError       another run writes to the store, or has taken it over
    └── StorageError     the object store refused, failed or behaved in a way that is unsafe
        ├── ObjectMissing    no object lies under that key
        └── UnsafeStore      the store ignores conditional writes; publishing on it would lose versions

A message names the place (YAML path, key or file), what was found, what was expected and what to do.
"""

__all__ = [
    "ArtifactError",
    "CbirError",
    "ConfigError",
    "DataError",
    "LeaseError",
    "ObjectMissing",
    "StorageError",
    "UnsafeStore",
]


class CbirError(Exception):
    """Base of every error that cbir raises on purpose."""


class ConfigError(CbirError):
    """The configuration asks for something that does not exist or cannot work."""


class DataError(CbirError):
    """The images, their keys or their features cannot be used as asked."""


class ArtifactError(CbirError):
    """A stored file, record or version is missing, incomplete or not what its record says."""


class LeaseError(CbirError):
    """Another run writes to the store, or has taken it over from this one."""


class StorageError(CbirError):
    """The object store refused, failed or behaved in an unsafe way."""


class ObjectMissing(StorageError):
    """No object lies under the key."""


class UnsafeStore(StorageError):
    """The store ignores conditional writes."""
