"""Weights from files into networks: what is missing, altered, unreadable or of another network is said at once."""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from cbir.errors import ConfigError
from cbir.features.backbone import Layer

__all__ = ["Created", "load_weights", "read_weights"]


@dataclass(frozen=True)
class Created:
    """A network before weights of one's own are loaded."""

    network: nn.Module
    layers: tuple[Layer, ...]
    """What to take from it; none stands for timm's `forward_features`."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    unused: tuple[str, ...]
    """Prefixes of weights that a file may lack, or have beyond those of the network."""


def read_weights(path: Path, field: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file of tensors only; `field` is their place in the YAML."""
    if not path.is_file():
        raise ConfigError(f"{field}: there is no file {path}")
    if sha256:
        _check_sha256(path, field, sha256)
    try:
        state: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise ConfigError(
            f"{field}: {path} is not a .safetensors file or a .pth file of tensors only: {error}"
        ) from error
    return state


def load_weights(
    network: nn.Module, state: dict[str, Tensor], owner: str, advice: str, optional: tuple[str, ...] = ()
) -> None:
    """Every weight of the network must be there in its shape, and nothing beside it.

    Weights whose names begin with an `optional` prefix may be missing or too many. ConfigError: "`owner`: weights ...
    missing, unknown, of another shape. `advice`".
    """
    wanted = network.state_dict()
    # Counters of batches matter to training only; old checkpoints lack them.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    problems = {
        "missing": [key for key in missing if not key.startswith(optional)],
        "unknown": [key for key in state if key not in wanted and not key.startswith(optional)],
        "of another shape": [key for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in problems.items() if keys]
    if found:
        raise ConfigError(f"{owner}: weights {'; '.join(found)}. {advice}")
    network.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _check_sha256(path: Path, field: str, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(
            f"{field}_sha256: {path} has sha256 {found}, expected {expected}; "
            f"fetch the file again, or change {field.rpartition('.')[2]}_sha256 if the new weights are meant"
        )
