"""What is wrong with a configuration, in words that name the YAML path and the nearest right word."""

import re
import reprlib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from cbir.spec import methods, nearest

__all__ = ["mistakes"]

_ROLES = {
    "extractor": "extractor",
    "detector": "detector",
    "descriptor": "descriptor",
    "mask": "mask",
    "proposer": "proposer",
    "encoder": "encoder",
    "encoders": "encoder",
    "index": "index",
    "fuse": "fusion",
    "rerank": "reranker",
    "pooling": "pooling",
}
"""The keys under which a method, or a list of methods, of a role stands."""


def mistakes(error: ValidationError) -> list[str]:
    """Every mistake that pydantic found, as a line that begins with its YAML path."""
    return [_explain(detail) for detail in error.errors()]


def _explain(detail: Any) -> str:
    """One mistake in words, beginning with its YAML path."""
    path, role = _yaml_path(detail["loc"])
    message, found = detail["msg"].removeprefix("Value error, "), reprlib.repr(detail["input"])
    match detail["type"]:
        case "union_tag_invalid":
            tag = detail["ctx"]["tag"]
            return f"{path}.name: unknown {role} {tag!r}{nearest(tag, methods(role))}"
        case "union_tag_not_found":
            return f"{path}.name: is missing; known are {', '.join(methods(role))}"
        case "model_attributes_type" | "model_type" if role:
            return f"{path}: expected a method such as {{name: {next(iter(methods(role)))}}}, found {found}"
        case "literal_error" if isinstance(detail["input"], str):
            words = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
            return f"{path}: unknown word {found}{nearest(detail['input'], words)}"
        case "value_error":  # of a model, whose message begins with the rest of the path
            return f"{path}.{message}" if path else message
        case "unknown_key":
            return f"{path or 'top level'}: {message}"
        case "missing":
            return f"{path}: is missing"
    return f"{path}: {message}, found {found}"


def _yaml_path(loc: Sequence[str | int]) -> tuple[str, str]:
    """The YAML path of a pydantic location, and the role of the method that it ends at, if it does.

    Pydantic also names the chosen member of a union, behind the place of the method.
    """
    path: list[str] = []
    role = ""
    for part in map(str, loc):
        if role and part in methods(role):
            role = ""
        elif part != "[key]":
            path.append(part)
            in_list = part.isdecimal() and len(path) > 1
            role = _ROLES.get(path[-2] if in_list else part, "")
    return ".".join(path), role
