"""torchvision networks with weights of one's own: creation, loading, and how they are run."""

import contextlib
import inspect
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cbir.errors import ConfigError
from cbir.spec import nearest
from cbir.types import Pixels

__all__ = ["VisionSpec", "create", "exactly", "pixels_on"]

UNUSED = ("aux_classifier.",)
"""Prefixes of weights that serve training only."""

SET_BY_CBIR = ("weights", "weights_backbone", "num_classes")


class VisionSpec(Protocol):
    """What a method that runs a torchvision model says about it; `role` names its place in the YAML."""

    @property
    def role(self) -> str:
        """The key of the method."""
        ...

    @property
    def model(self) -> str:
        """Its name in torchvision."""
        ...

    @property
    def model_args(self) -> Mapping[str, Any]:
        """Further arguments."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        ...

    @property
    def seed(self) -> int:
        """Of random weights."""
        ...


def create(spec: VisionSpec, module: ModuleType, weights: Path | None, device: str) -> nn.Module:
    """The frozen network; random where `weights` is None. ConfigError for a model or weights that do not fit."""
    known = torchvision.models.list_models(module=module)
    if spec.model not in known:
        raise ConfigError(
            f"{spec.role}.model: torchvision has no such model {spec.model!r}{nearest(spec.model, known)}"
        )
    network = _random(spec)
    if weights is not None:
        _load(network, spec, weights)
    return network.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Inference with deterministic kernels in full float32: the defaults of cuDNN round inputs to 10 bits."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield


def pixels_on(device: str, image: Pixels) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 from 0 to 1."""
    return torch.tensor(image, device=device).permute(2, 0, 1).float() / 255


def _random(spec: VisionSpec) -> nn.Module:
    arguments = {"weights": None, "weights_backbone": None, "num_classes": spec.num_classes, **spec.model_args}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        try:
            network: nn.Module = torchvision.models.get_model(spec.model, **arguments)
        except TypeError as error:
            raise ConfigError(
                f"{spec.role}.model_args: {spec.model} refuses {dict(spec.model_args)}: {error}"
            ) from error
    _refuse_unknown(spec, network)
    return network


def _refuse_unknown(spec: VisionSpec, network: nn.Module) -> None:
    """torchvision's models take any keyword and ignore what they do not know."""
    takers = [torchvision.models.get_model_builder(spec.model), *type(network).__mro__]
    known = {name for taker in takers for name in inspect.signature(taker).parameters} - {*SET_BY_CBIR}
    for name in spec.model_args:
        if name not in known:
            raise ConfigError(f"{spec.role}.model_args: {spec.model} has no argument {name!r}{nearest(name, known)}")


def _load(network: nn.Module, spec: VisionSpec, path: Path) -> None:
    state, wanted = _read(spec, path), network.state_dict()
    problems = {
        # Counters of batches matter to training only; frozen normalisation has none.
        "missing": [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")],
        "unknown": [key for key in state if key not in wanted and not key.startswith(UNUSED)],
        "of another shape": [key for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in problems.items() if keys]
    if found:
        raise ConfigError(
            f"{spec.role}.weights: {path} is not of {spec.model} with {spec.num_classes} classes: weights "
            f"{'; '.join(found)}. Name the model, num_classes and model_args that they were saved from"
        )
    network.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _read(spec: VisionSpec, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"{spec.role}.weights: there is no file {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        return dict(state.get("model", state))  # torchvision's own training saves the network under this key
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{spec.role}.weights: {path} is not a .safetensors file or a .pth file of tensors only: {error}"
        ) from error
