"""How a configuration names files of weights. Nothing here needs torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cbir.errors import ConfigError
from cbir.spec import Method

__all__ = ["Sha256", "file_or_none", "files_of", "identity_without_files", "is_file", "local_path", "present"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def is_file(weights: str) -> bool:
    """Whether this is a path or a URI, not the name of weights."""
    return "/" in weights or weights.endswith(SUFFIXES)


def file_or_none(weights: str, source: str) -> None:
    """ValueError if `weights` is neither a file nor `none`, with the `source` of a file that would do."""
    if weights != "none" and not is_file(weights):
        raise ValueError(
            f"weights must be the path or s3:// URI of a file ({source}), or 'none' (random), found {weights!r}; "
            "nothing is downloaded"
        )


def local_path(field: str, weights: str, assets: Mapping[str, Path]) -> Path | None:
    """Where the weights of a field are: among the assets, or at their own local path; None if they are no file."""
    given = Path(weights.removeprefix("file://")) if is_file(weights) else None
    return assets.get(field, given)


def present(path: Path | None, field: str, source: str) -> Path | None:
    """The path, if there is a file; ConfigError with the `source` of one that would do otherwise."""
    if path is not None and not path.is_file():
        raise ConfigError(f"{field}: there is no file {path}; get {source}, nothing is downloaded")
    return path


def files_of(part: str, assets: Mapping[str, Path]) -> dict[str, Path]:
    """The assets of one part of a method, that are named `part.field`, by their field."""
    return {name.removeprefix(f"{part}."): path for name, path in assets.items() if name.startswith(f"{part}.")}


def identity_without_files(part: Method, files: Mapping[str, str]) -> dict[str, Any]:
    """Fields and version of one part of a method, but for its files, which count by their content, not their path."""
    return {field: value for field, value in part.identity().items() if field not in files}
