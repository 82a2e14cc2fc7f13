"""How the network of `deep` runs on a device: its precision, its form, and passes of always as many images."""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbir.errors import ConfigError
from cbir.features.deep import Deep
from cbir.features.networks.backbone import Backbone
from cbir.features.networks.folding import fold_normalisation
from cbir.features.networks.vision import exactly
from cbir.types import Floats, Pixels

__all__ = ["Network", "Passes", "network_on"]

Network = Callable[[Tensor], list[Tensor]]
"""uint8 RGB images (N, H, W, 3) on the device -> float32 maps or vectors of each layer."""

IN_FLIGHT = 2
"""Passes: while one is computed, the pixels of the next travel."""

OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}

logger = logging.getLogger(__name__)


def network_on(backbone: Backbone, spec: Deep, shape: tuple[int, int], device: torch.device) -> Network:
    """The backbone in the precision and form that the spec asks for; `shape` is a height and width that it will see.

    ConfigError where the device does not have them. Nothing is chosen by what the processor can do: what it cannot is
    refused, so that the spec alone, which the fingerprints hold, says how a descriptor was rounded.
    """
    _check_precision(spec.precision, device)
    if spec.runtime == "openvino":
        return _OpenVino(backbone, spec, device)
    backbone.to(device)
    if spec.precision != "float32":
        _reduce(backbone, getattr(torch, spec.precision), shape, device)

    def outputs(images: Tensor) -> list[Tensor]:
        return [output.float() for output in backbone.outputs(images)]

    return _Compiled(outputs, spec.backbone) if spec.compile else outputs


def _reduce(backbone: Backbone, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> None:
    """To 16 bits, with as little rounding as can be."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, *shape, 3), dtype=torch.uint8, generator=generator).to(device)
    with exactly():
        fold_normalisation(backbone.network, lambda: backbone.outputs(noise))
    backbone.network.to(dtype)


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("extractor.precision: float16 needs a GPU, found a CPU; use bfloat16 or float32")
    if precision == "bfloat16" and not _has_bfloat16(device):
        raise ConfigError(
            f"extractor.precision: bfloat16 needs a processor with AVX512_BF16 or AMX, or a GPU that computes with it, "
            f"which this {device.type} does not; use float32, or run on machines that have it"
        )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Compiled:
    """By torch.compile, a program for each shape.

    On a CPU the weights are constants of it: convolutions take in the normalisation that follows them, and weights are
    laid out once as the kernels want them. Never the plain network instead, which rounds otherwise: ConfigError.
    """

    def __init__(self, network: Network, backbone: str) -> None:
        self._run: Network = torch.compile(network, dynamic=False, fullgraph=True)
        self._backbone = backbone
        self._shapes: set[tuple[int, ...]] = set()

    def __call__(self, images: Tensor) -> list[Tensor]:
        if images.shape in self._shapes:
            return self._run(images)
        outputs = self._compile(images)
        self._shapes.add(tuple(images.shape))
        return outputs

    def _compile(self, images: Tensor) -> list[Tensor]:
        # The limit is of all networks of a process together.
        many = torch._dynamo.config.patch(recompile_limit=1 << 10, accumulated_recompile_limit=1 << 10)
        constants = torch._inductor.config.patch(freezing=images.device.type == "cpu")
        try:
            with many, constants:
                return self._run(images)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            raise ConfigError(
                f"extractor.compile: backbone {self._backbone!r} at {images.shape[1]} x {images.shape[2]} pixels "
                f"fails: {str(error).strip().splitlines()[0]}. It takes a C++ compiler on every worker and a network "
                "of fixed operations; compile: false does without"
            ) from error


class _Outputs(nn.Module):
    """The outputs of a backbone as a module, the form in which it is converted."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone.outputs(images))


class _OpenVino:
    """By OpenVINO, a program for each shape, with as many threads as torch has."""

    def __init__(self, backbone: Backbone, spec: Deep, device: torch.device) -> None:
        if device.type != "cpu":
            raise ConfigError(f"extractor.runtime: openvino computes on CPUs, found {device}; use runtime: torch")
        try:
            import openvino
        except ImportError as error:
            raise ConfigError(
                "extractor.runtime: openvino is not installed; pip install 'cbir[openvino]', or use runtime: torch"
            ) from error
        self._core = openvino.Core()
        self._module, self._type = _Outputs(backbone).eval(), OPENVINO_TYPES[spec.precision]
        self._requests: dict[tuple[int, ...], Any] = {}

    def __call__(self, images: Tensor) -> list[Tensor]:
        shape = tuple(images.shape)
        if shape not in self._requests:
            self._requests[shape] = self._request(images)
        found = self._requests[shape].infer([images.numpy()])
        return [torch.from_numpy(output) for output in found.to_tuple()]

    def _request(self, images: Tensor) -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": self._type,  # by default it is bfloat16 wherever the processor has it
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # the workers of a machine would share the first cores
        }
        return self._core.compile_model(self._converted(images), "CPU", options).create_infer_request()

    def _converted(self, images: Tensor) -> Any:
        """For images of this shape; not by `openvino.convert_model`, which tells its makers of every call."""
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a trace makes constant: the shape, which it is to do
            traced = TorchScriptPythonDecoder(
                self._module, example_input=(images,), trace_kwargs={"check_trace": False}
            )
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(traced))
        model.reshape({0: list(images.shape)})
        return model


class Passes:
    """Images of one shape through a network in passes of always `size`, filled up with black ones.

    Kernels are chosen by the size of a pass and round differently, so that a fixed one keeps an image's rows from
    depending on its neighbours. On a GPU, pixels travel from pinned memory on a stream of their own while the pass
    before is computed. Where a pass does not fit into memory, `size` is halved for good and the work goes on; rows of
    the halves may differ in their last bits. ConfigError where not even one image fits.
    """

    def __init__(self, run: Network, device: torch.device, size: int) -> None:
        self.size = size
        self._run, self._device = run, device
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def rows(self, groups: Iterable[Sequence[Pixels]]) -> Iterator[list[Floats]]:
        """For each group of images of one shape, at least one, what the network gives: (N, ...) of each layer."""
        ahead: deque[list[_Pass]] = deque()
        for images in groups:
            ahead.append(self._launch(images))
            if len(ahead) == IN_FLIGHT:
                yield _collected(ahead.popleft())
        while ahead:
            yield _collected(ahead.popleft())

    def _launch(self, images: Sequence[Pixels]) -> list["_Pass"]:
        launched: list[_Pass] = []
        start = 0
        while start < len(images):
            some = images[start : start + self.size]
            one = self._launch_pass(some)
            if one is None:  # handled here, where no traceback holds on to the memory of the pass
                self._halve(some[0])
            else:
                launched.append(one)
                start += one.num
        return launched

    def _launch_pass(self, images: Sequence[Pixels]) -> "_Pass | None":
        """None if it does not fit into memory."""
        try:
            with exactly():
                return _Pass(self._run(self._sent(images)), len(images))
        except torch.OutOfMemoryError:
            return None

    def _sent(self, images: Sequence[Pixels]) -> Tensor:
        """The pixels of a whole pass (size, H, W, 3) on the device."""
        copies = self._copies
        host = torch.zeros((self.size, *images[0].shape), dtype=torch.uint8, pin_memory=copies is not None)
        np.stack(images, out=host.numpy()[: len(images)])
        if copies is None:
            return host
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(copies):
            pixels = host.to(self._device, non_blocking=True)
        computing.wait_stream(copies)
        pixels.record_stream(computing)
        return pixels

    def _halve(self, image: Pixels) -> None:
        if self.size == 1:
            height, width = image.shape[:2]
            raise ConfigError(
                f"extractor.size: one image of {height} x {width} pixels does not fit into the memory of "
                f"{self._device}; use smaller sizes or scales, or fewer workers on the device"
            )
        self.size //= 2
        logger.warning("out of memory on %s: passes of %d images from now on", self._device, self.size)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class _Pass:
    """Outputs on their way from the device."""

    def __init__(self, outputs: Sequence[Tensor], num: int) -> None:
        self.num = num
        self._outputs = [output[:num].to("cpu", non_blocking=True) for output in outputs]
        device = outputs[0].device
        self._done = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def collected(self) -> list[Floats]:
        """(num, ...) of each layer; waits for the device."""
        if self._done is not None:
            self._done.synchronize()
        return [output.numpy() for output in self._outputs]


def _collected(passes: Sequence[_Pass]) -> list[Floats]:
    """One after the other, layer by layer."""
    return [np.concatenate(layer) for layer in zip(*(one.collected() for one in passes), strict=True)]
