"""Typed configuration and the registry of methods in one.

A method is one frozen pydantic model: its fields are its YAML keys, its docstring is its documentation, its class
variables name its role, its paper and its version, and defining it registers it. YAML makes it, Ray ships it as data
and the worker turns it into a working object.

    class Sift(ExtractorSpec):
        '''SIFT (Lowe 2004): ...'''
        name: Literal["sift"] = "sift"
        paper: ClassVar[str] = "Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004"
        max_features: int = 1000
"""

import difflib
import functools
import hashlib
import importlib
import json
import operator
import pkgutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cbir.errors import ConfigError

__all__ = ["Method", "Spec", "fingerprint", "import_methods", "methods", "nearest", "one_of", "roles"]


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar of the words, or the list of them where none is similar."""
    known = sorted(words)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def fingerprint(*parts: Any) -> str:
    """sha256 over the canonical JSON of the parts: equal parts, equal fingerprint, on every machine."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Spec(BaseModel):
    """A frozen piece of configuration that refuses unknown keys and names the nearest right one."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                hint = nearest(str(unknown[0]), cls.model_fields)
                message = f"unknown key '{unknown[0]}'{hint}"  # as one value: a key may hold braces of its own
                raise PydanticCustomError("unknown_key", "{message}", {"message": message})
        return data


class Method(Spec):
    """A registered method: a role subclasses it without, a method subclasses the role with a field `name`.

    `version` is raised whenever the same fields give other bytes, so that stored work of older code is not reused.
    """

    role: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1

    if TYPE_CHECKING:
        name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "name" in cls.model_fields:
            _register(cls)

    def identity(self) -> dict[str, Any]:
        """What a fingerprint takes of this method: its fields and its version."""
        return {**self.model_dump(mode="json"), "version": self.version}


_registry: dict[str, dict[str, type[Method]]] = {}


def _register(cls: type[Method]) -> None:
    name = cls.model_fields["name"].default
    known = _registry.setdefault(cls.role, {}).setdefault(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"{cls.role} {name!r} is registered twice: {known.__module__} and {cls.__module__}")


def methods(role: str) -> dict[str, type[Method]]:
    """The registered methods of a role by name, in alphabetical order."""
    return dict(sorted(_registry.get(role, {}).items()))


def roles() -> list[str]:
    """The roles that have methods."""
    return sorted(_registry)


def import_methods(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its methods register; called by the package's `__init__`."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def one_of(role: str) -> Any:
    """The type "any registered method of the role", chosen by its `name`; call it after the role's modules."""
    classes = list(methods(role).values())
    union = functools.reduce(operator.or_, classes)
    return Annotated[union, Field(discriminator="name")] if len(classes) > 1 else union
