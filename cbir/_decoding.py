"""From the bytes of one image file to upright RGB pixels, in the process that calls it.

The caller's own process and the decoder processes share this module, so that both give the same bytes. A decoder
process has to start fast: only the standard library, numpy and Pillow are imported here.
"""

import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import (  # each reader registers itself
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

__all__ = ["BadImage", "Decoded", "Fit", "Reason", "Terms", "decode_image", "refuse"]

Fit = Literal["stretch", "longest"]

Reason = Literal[
    "empty",
    "not_an_image",
    "unsupported",
    "truncated",
    "corrupt",
    "too_many_bytes",
    "too_many_pixels",
    "too_much_memory",
    "too_slow",
    "decoder_died",
]
"""Why an image cannot be used: no bytes; of no known format; of a known format or variant that is not read; cut short;
damaged; beyond a limit on bytes, pixels, memory or time; or it killed its decoder."""


@dataclass(frozen=True)
class Decoded:
    """An upright RGB image: `pixels` (H, W, 3) uint8, C-contiguous; `size`: height, width of the upright original."""

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used: why, and one line of detail that is the same in every run."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Terms:
    """What is asked of a decoder: the size it shall deliver, and the limits that do not need a process of its own."""

    size: int
    fit: Fit
    oversampling: float
    max_bytes: int
    max_pixels: int


class _Refused(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.verdict = BadImage(reason, detail)


_PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    PpmImagePlugin.PpmImageFile,
    AvifImagePlugin.AvifImageFile,
    Jpeg2KImagePlugin.Jpeg2KImageFile,
)
"""Formats of photographs, told by their first bytes. Pillow's other readers only widen what a hostile file can reach
(one of them starts Ghostscript)."""

_UNSUPPORTED = (
    (b"#?R", "Radiance HDR"),
    (b"v/1\x01", "OpenEXR"),
    (b"\0\0\1\0", "Windows icon"),
    (b"icns", "Apple icon"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"II\x2a\0\x10\0\0\0CR", "Canon raw"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"<svg", "SVG"),
)

_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise on broken files; its documentation promises OSError alone."""

_SYMPTOMS: tuple[tuple[str, Reason], ...] = (
    ("truncated", "truncated"),
    ("data too large", "too_much_memory"),
    ("memory", "too_much_memory"),
    ("cannot handle", "unsupported"),
    ("unsupported", "unsupported"),
    ("not supported", "unsupported"),
    ("not installed", "unsupported"),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the stored pixels upright."""

_TURNED = (5, 6, 7, 8)
"""The orientations that exchange height and width."""

_WHITES = {"I": (65535,), "F": (1, 255, 65535)}
"""The usual values of white where the mode does not say it."""


def decode_image(data: bytes, terms: Terms) -> Decoded | BadImage:
    """Decode, make upright, convert to RGB and resize; whatever is wrong with the file comes back as a BadImage."""
    if (refused := refuse(data, terms)) is not None:
        return refused
    try:
        return _decode(data, terms)
    except _Refused as refusal:
        return refusal.verdict
    except MemoryError:
        return BadImage("too_much_memory", "the decoder asked for more memory than it is allowed")
    except Image.DecompressionBombError:
        return BadImage("too_many_pixels", f"the header promises more than the {terms.max_pixels} pixels allowed")
    except _UNREADABLE as error:
        return BadImage(_diagnosis(error, data), _one_line(error))


def refuse(data: bytes, terms: Terms) -> BadImage | None:
    """What is wrong with a file by its length alone."""
    if not data:
        return BadImage("empty", "the file has no bytes")
    if len(data) > terms.max_bytes:
        return BadImage("too_many_bytes", f"{len(data)} bytes, at most {terms.max_bytes} are allowed")
    return None


def _decode(data: bytes, terms: Terms) -> Decoded:
    image = _open(data)
    width, height = image.size
    if width * height > terms.max_pixels:
        raise _Refused("too_many_pixels", f"{width} x {height} pixels, at most {terms.max_pixels} are allowed")
    target = _target(width, height, terms)
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, where that still covers the target often enough.
    image.draft(None, (math.ceil(target[0] * terms.oversampling), math.ceil(target[1] * terms.oversampling)))
    image.load()
    small = _to_rgb(image).resize(target, Image.Resampling.BILINEAR)
    orientation = _orientation(image)
    if orientation in _UPRIGHT:  # after the resize: cheaper, and at most one grey level away from before it
        small = small.transpose(_UPRIGHT[orientation])
    return Decoded(np.array(small), (width, height) if orientation in _TURNED else (height, width))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read the header; no pixel is decoded yet."""
    first_bytes = data[:16].ljust(16, b"\0")
    for plugin in _PLUGINS:
        open_file, accepts = Image.OPEN[plugin.format]
        if accepts is not None and accepts(first_bytes):
            return open_file(io.BytesIO(data), "")
    for signature, name in _UNSUPPORTED:
        if data.startswith(signature):
            raise _Refused("unsupported", f"{name} files are not read")
    if data[4:8] == b"ftyp" and data[8:11] == b"hei":
        raise _Refused("unsupported", "HEIC files are not read")
    try:
        return TgaImagePlugin.TgaImageFile(io.BytesIO(data), "")  # has no signature, only a plausible header
    except _UNREADABLE as error:
        raise _Refused("not_an_image", f"no known image format begins with {data[:8].hex(' ')}") from error


def _target(width: int, height: int, terms: Terms) -> tuple[int, int]:
    """Width and height to deliver, before the image is turned upright."""
    if terms.fit == "stretch":
        return terms.size, terms.size
    longest = max(width, height)
    if longest <= terms.size:
        return width, height
    return max(1, round(width * terms.size / longest)), max(1, round(height * terms.size / longest))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image; 1 where there is none or the EXIF cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _UNREADABLE:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits per colour; transparent pixels lie on white; embedded colour profiles are ignored."""
    if image.mode in _WHITES or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(layer, mask=layer)
    return canvas


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, 32 bits or floats on 0 to 255.

    Sixteen bits lose their low byte, as Pillow's sixteen-bit colours do. Wider modes are divided by the smallest usual
    white that no value passes; where there is none, the image's own range becomes 0 to 255.
    """
    values = np.array(image)
    if image.mode in _WHITES:
        return Image.fromarray(_scaled(values.astype(np.float32, copy=False), _WHITES[image.mode]))
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = 65535
    return Image.fromarray((values >> 8).astype(np.uint8))


def _scaled(values: npt.NDArray[np.float32], whites: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    black, white = next(((0.0, float(white)) for white in whites if low >= 0 and high <= white), (low, high))
    values -= black
    values *= 255 / (white - black) if white > black else 0
    return np.rint(values, out=values).astype(np.uint8)


def _diagnosis(error: BaseException, data: bytes) -> Reason:
    if isinstance(error, EOFError) or _is_cut_riff(data):
        return "truncated"
    message = str(error).lower()
    return next((reason for symptom, reason in _SYMPTOMS if symptom in message), "corrupt")


def _is_cut_riff(data: bytes) -> bool:
    """Whether a WebP file ends before the length that its header declares."""
    return data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _one_line(error: BaseException) -> str:
    """The message of an exception on one line of at most 200 characters, without memory addresses."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", words).encode("ascii", "backslashreplace").decode()[:200]
