"""YAML files as plain data, and single values put in their places; every mistake is a ConfigError."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cbir.errors import ConfigError

__all__ = ["put", "read_yaml"]

_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""ValueError is of scalars that only look like a date or a number (2026-99-99)."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text file: {error.reason} at byte {error.start}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except _NOT_YAML as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of keys such as images, store and channels")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error rather than silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # `<<` merges other mappings, whose keys the mapping's own may repeat.
            key = None if key_node.tag == "tag:yaml.org,2002:merge" else self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key is not None:
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def put(data: dict[str, Any], override: str) -> None:
    """Put a value in its place: `dotted.path=value` with a YAML value; elements of lists are named by their number."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override}: expected dotted.path=value, for example sample.images=1000")
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except _NOT_YAML as error:
        raise ConfigError(f"--set {path}: {text!r} is not valid YAML: {error}") from None
    *parents, last = path.split(".")
    place: Any = data
    for depth, key in enumerate(parents):
        place = _child(place, key, path, ".".join(parents[:depth]))
    place[_position(place, last, path, ".".join(parents))] = value


def _child(place: Any, key: str, path: str, parent: str) -> Any:
    """The group of keys or the list under a key; a group that is not there yet is made."""
    position = _position(place, key, path, parent)
    if isinstance(place, dict) and place.get(position) is None:
        place[position] = {}
    child = place[position]
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {path}: {'.'.join(filter(None, [parent, key]))} is {child!r}, not a group of keys")
    return child


def _position(place: Any, key: str, path: str, parent: str) -> str | int:
    if isinstance(place, dict):
        return key
    if not key.isdecimal() or int(key) >= len(place):
        raise ConfigError(f"--set {path}: {parent} is a list of {_count(place)}, numbered from 0; found {key!r}")
    return int(key)


def _count(elements: Sequence[Any]) -> str:
    return f"{len(elements)} element" + ("" if len(elements) == 1 else "s")
