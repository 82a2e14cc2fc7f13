"""Decoding: what is delivered, what is refused, and what a hostile file can do to a decoder process (nothing)."""

import csv
import io
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cbir._decode_process import DecodeProcess
from cbir._decoding import Terms
from cbir.errors import CbirError
from cbir.images import BadImage, Decoded, Decoder, Limits, View, decode

SMALL = View(size=64)
SQUARE = View(size=32, fit="stretch")
LIMITS = Limits()

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def photograph(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth colourful picture with some detail."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    detail = generator.integers(-20, 21, (height, width, 1))
    return Image.fromarray(np.clip(smooth + detail, 0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, view: View = SMALL) -> np.ndarray:
    verdict = decode(data, view, LIMITS)
    assert isinstance(verdict, Decoded), verdict
    assert verdict.pixels.dtype == np.uint8
    assert verdict.pixels.ndim == 3
    assert verdict.pixels.shape[2] == 3
    assert verdict.pixels.flags.c_contiguous
    assert verdict.pixels.flags.writeable
    return verdict.pixels


def reason_of(data: bytes, limits: Limits = LIMITS) -> str:
    verdict = decode(data, SMALL, limits)
    assert isinstance(verdict, BadImage), verdict
    assert 0 < len(verdict.detail) <= 200
    assert verdict.detail.isprintable()
    return verdict.reason


def same(first: Decoded | BadImage, second: Decoded | BadImage) -> bool:
    if isinstance(first, Decoded) and isinstance(second, Decoded):
        return first.size == second.size and np.array_equal(first.pixels, second.pixels)
    return first == second


# --- what is delivered ---


@pytest.mark.parametrize("size", [(100, 60), (224, 224), (40, 300), (1, 1), (3, 900)])
def test_stretch_is_pillows_bilinear_resize(size: tuple[int, int]) -> None:
    data = encoded(photograph(*size), "PNG")
    expected = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels_of(data, View(size=224, fit="stretch")), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (64, 64)), ((63, 20), (63, 20)), ((128, 64), (64, 32)), ((50, 200), (16, 64)), ((5000, 1), (64, 1))],
)
def test_longest_keeps_the_aspect_and_never_enlarges(size: tuple[int, int], expected: tuple[int, int]) -> None:
    verdict = decode(encoded(photograph(*size), "PNG"), SMALL, LIMITS)
    assert isinstance(verdict, Decoded)
    assert verdict.pixels.shape == (expected[1], expected[0], 3)
    assert verdict.size == (size[1], size[0])


def full_decode(data: bytes, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("width", "scale"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (1400, 8)])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_covers_the_view(width: int, scale: int) -> None:
    data = encoded(photograph(width, width), "JPEG", quality=90)
    scaled = Image.open(io.BytesIO(data))
    scaled.draft(None, (width // scale, width // scale))
    assert scaled.width == -(-width // scale)
    assert scaled.width >= SMALL.size
    expected = np.asarray(scaled.resize((SMALL.size, SMALL.size), Image.Resampling.BILINEAR))
    assert np.array_equal(pixels_of(data), expected)
    assert np.array_equal(pixels_of(data), full_decode(data, 64, 64)) == (scale == 1)


def test_a_scaled_jpeg_looks_like_a_full_one() -> None:
    data = encoded(photograph(640, 480), "JPEG", quality=90)
    difference = pixels_of(data).astype(int) - full_decode(data, 64, 48)
    assert np.abs(difference).mean() < 2
    assert decode(data, SMALL, LIMITS).size == (480, 640)  # type: ignore[union-attr]


STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(upright: Image.Image, orientation: int, file_format: str) -> bytes:
    """A file whose pixels are stored turned and whose EXIF says how to turn them back."""
    transposition = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(upright if transposition is None else upright.transpose(transposition), file_format, exif=exif)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_every_orientation_ends_upright(orientation: int, file_format: str) -> None:
    corners = np.zeros((2, 3, 3), np.uint8)
    corners[0, 0], corners[0, 2], corners[1, 0], corners[1, 2] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    upright = Image.fromarray(corners).resize((96, 64), Image.Resampling.NEAREST)
    verdict = decode(turned(upright, orientation, file_format), SMALL, LIMITS)
    assert isinstance(verdict, Decoded)
    assert verdict.size == (64, 96)
    expected = np.asarray(upright.resize((64, 43), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(verdict.pixels - expected).mean() < 6


def test_a_turned_jpeg_is_scaled_too() -> None:
    upright = photograph(900, 600)
    data = turned(upright, 6, "JPEG")
    verdict = decode(data, SMALL, LIMITS)
    assert isinstance(verdict, Decoded)
    assert verdict.size == (600, 900)
    assert verdict.pixels.shape == (43, 64, 3)
    stored = Image.open(io.BytesIO(data))
    stored.draft(None, (43, 64))
    assert stored.size == (75, 113)
    expected = stored.transpose(Image.Transpose.ROTATE_270).resize((64, 43), Image.Resampling.BILINEAR)
    assert np.abs(verdict.pixels.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0garbage and more of it", b"\xff" * 40]
)
def test_malformed_exif_leaves_the_image_as_stored(exif: bytes) -> None:
    image = photograph(48, 20)
    plain, odd = encoded(image, "JPEG"), encoded(image, "JPEG", exif=exif)
    assert exif in odd
    assert np.array_equal(pixels_of(odd), pixels_of(plain))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    image, exif = photograph(48, 20), Image.Exif()
    exif[0x0112] = value
    assert pixels_of(encoded(image, "JPEG", exif=exif)).shape == (20, 48, 3)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000", "TGA"])
def test_formats(file_format: str) -> None:
    image = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    assert np.abs(pixels_of(encoded(image, file_format)).astype(int) - np.asarray(image)).max() <= 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_without_alpha_become_what_pillow_makes_of_them(mode: str) -> None:
    image = photograph(40, 30, mode)
    data = encoded(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    assert np.array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_cmyk_of_adobe_is_not_a_negative() -> None:
    image = Image.new("RGB", (16, 16), (250, 240, 30))
    assert np.abs(pixels_of(encoded(image.convert("CMYK"), "JPEG")).astype(int) - (250, 240, 30)).max() < 10


def transparent_images() -> Iterator[Any]:
    colour = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    colour.paste((200, 0, 0, 0), (0, 0, 4, 8))
    grey = Image.new("LA", (8, 8), (90, 255))
    grey.paste((90, 0), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([7, 7, 7, 200, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    plain = Image.new("RGB", (8, 8), (200, 0, 0))
    plain.paste((1, 2, 3), (0, 0, 4, 8))
    wide = Image.fromarray(np.repeat(np.array([[300] * 4 + [90 * 256] * 4], np.uint16), 8, 0))
    yield pytest.param(encoded(colour, "PNG"), (200, 0, 0), id="RGBA")
    yield pytest.param(encoded(colour, "WEBP", lossless=True), (200, 0, 0), id="WebP")
    yield pytest.param(encoded(grey, "PNG"), (90, 90, 90), id="LA")
    yield pytest.param(encoded(palette, "PNG", transparency=0), (200, 0, 0), id="P-PNG")
    yield pytest.param(encoded(palette, "GIF", transparency=0), (200, 0, 0), id="P-GIF")
    yield pytest.param(encoded(plain, "PNG", transparency=(1, 2, 3)), (200, 0, 0), id="RGB-tRNS")
    yield pytest.param(encoded(wide, "PNG", transparency=300), (90, 90, 90), id="16-bit-tRNS")


@pytest.mark.parametrize(("data", "colour"), list(transparent_images()))
def test_transparent_pixels_lie_on_white(data: bytes, colour: tuple[int, int, int]) -> None:
    pixels = pixels_of(data)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == colour).all()


def test_half_transparent_is_half_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    assert np.abs(pixels_of(encoded(image, "PNG")).astype(int) - (127, 177, 227)).max() <= 1


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize(
    ("array", "file_format"),
    [(RAMP, "PNG"), (RAMP, "TIFF"), (RAMP, "PPM"), (RAMP.astype(np.int32), "TIFF"), (RAMP.astype(np.float32), "TIFF")],
)
def test_sixteen_bits_are_scaled_not_clipped(array: np.ndarray, file_format: str) -> None:
    expected = np.arange(256).reshape(16, 16)
    pixels = pixels_of(encoded(Image.fromarray(array), file_format)).astype(int)
    assert (pixels == expected[..., None]).all()


def test_big_endian_sixteen_bits() -> None:
    image = Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes())
    assert (pixels_of(encoded(image, "TIFF"))[..., 0] == np.arange(256).reshape(16, 16)).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 5e5, 2e6], [0, 64, 255]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
        ([np.nan, 1.0, np.inf], [0, 255, 0]),
    ],
)
def test_floats_use_the_smallest_usual_white_or_their_own_range(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert pixels_of(encoded(image, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_show_their_first_frame(file_format: str) -> None:
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    pixels = pixels_of(encoded(red, file_format, save_all=True, append_images=[blue]))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


def test_colour_profiles_are_ignored() -> None:
    image = photograph(20, 20)
    assert np.array_equal(pixels_of(encoded(image, "PNG", icc_profile=b"not a profile")), np.asarray(image))


# --- what is refused ---


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG made of an IHDR and the given chunks."""
    header = (b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in (header, *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    return b"".join(parts)


BOMB = zlib.compress(bytes(20_000_000), 9)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"P", "not_an_image"),
        (b"\xff", "not_an_image"),
        (b"<html>404 not found</html>", "not_an_image"),
        (bytes(1000), "not_an_image"),
        (b"8BPS and so on", "unsupported"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unsupported"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "truncated"),
        (b"P6 -3 4 255 abcdefghijklmnop", "corrupt"),
        (png((b"IDAT", zlib.compress(bytes(10)))), "truncated"),
        (png((b"IDAT", b"no deflate stream")), "corrupt"),
        (png(size=(20_000, 20_000)), "too_many_pixels"),
        (png((b"zTXt", b"k\0\0" + BOMB)), "too_much_memory"),
        (png((b"iCCP", b"k\0\0" + BOMB)), "too_much_memory"),
        (b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0\0;", "too_many_pixels"),
    ],
)
def test_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert reason_of(data) == reason


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_that_is_cut_short_is_not_half_an_image(file_format: str, kept: float) -> None:
    data = encoded(photograph(90, 70), file_format)
    expected = {"truncated"} if file_format != "TIFF" else {"truncated", "corrupt"}
    assert reason_of(data[: int(kept * len(data))]) in expected


def test_a_scaled_or_progressive_jpeg_that_is_cut_short_is_refused() -> None:
    for progressive in (False, True):
        data = encoded(photograph(900, 700), "JPEG", progressive=progressive)
        assert reason_of(data[: len(data) * 3 // 4]) == "truncated"


def test_limits_of_bytes_and_pixels_are_exact() -> None:
    data = encoded(photograph(100, 10), "PNG")
    assert pixels_of(data).shape == (6, 64, 3)
    assert reason_of(data, Limits(megapixels=999e-6)) == "too_many_pixels"
    assert isinstance(decode(data, SMALL, Limits(megapixels=1000e-6)), Decoded)
    assert reason_of(data, Limits(megabytes=(len(data) - 1) / 1e6)) == "too_many_bytes"
    assert isinstance(decode(data, SMALL, Limits(megabytes=(len(data) + 0.5) / 1e6)), Decoded)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", load)
    assert reason_of(encoded(photograph(50, 50), "JPEG"), Limits(megapixels=0.001)) == "too_many_pixels"


def test_details_are_the_same_in_every_run() -> None:
    data = b"II*\0\x08\0\0\0" + bytes(range(256))
    assert decode(data, SMALL, LIMITS) == decode(bytes(bytearray(data)), SMALL, LIMITS)
    assert "0x7" not in decode(data, SMALL, LIMITS).detail  # type: ignore[union-attr]


# --- the processes ---


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(SMALL, LIMITS, 2) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def heavy() -> bytes:
    """A small file that decodes to 81 million pixels: about a second."""
    return encoded(Image.new("RGB", (9000, 9000), (1, 2, 3)), "PNG", compress_level=1)


def children() -> list[int]:
    """The decoder processes of this process."""
    tasks = Path("/proc/self/task").iterdir()
    pids = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    return sorted(pid for pid in pids if "_decode_child" in command_line(pid))


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def eventually(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited 20 s in vain"
        time.sleep(0.002)
    return found


def test_a_process_gives_the_same_bytes(decoder: Decoder) -> None:
    files = [
        encoded(photograph(300, 200), "JPEG"),
        encoded(photograph(30, 20), "JPEG"),
        encoded(photograph(90, 80, "RGBA"), "PNG"),
        turned(photograph(90, 80), 5, "JPEG"),
        b"",
        b"no image",
        encoded(photograph(90, 80), "PNG")[:900],
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0\0;",
    ]
    for data in files:
        assert same(decoder.decode(data), decode(data, SMALL, LIMITS))


def test_a_result_is_not_overwritten_by_the_next(decoder: Decoder) -> None:
    data = [encoded(photograph(80, 60, seed=seed), "PNG") for seed in range(4)]
    verdicts = [decoder.decode(file) for file in data]
    assert all(same(verdict, decode(file, SMALL, LIMITS)) for verdict, file in zip(verdicts, data, strict=True))


def test_map_keeps_the_order_and_reads_ahead_a_little(decoder: Decoder) -> None:
    files = [encoded(photograph(40 + 37 * (i % 5), 30, seed=i), "PNG") for i in range(60)]
    taken: list[int] = []

    def items() -> Iterator[tuple[int, bytes]]:
        for key, data in enumerate(files):
            taken.append(key)
            yield key, data

    furthest = 0
    for position, (key, verdict) in enumerate(decoder.map(items())):
        assert key == position
        assert same(verdict, decode(files[key], SMALL, LIMITS))
        furthest = max(furthest, taken[-1] - position)
    assert position == 59
    assert 2 <= furthest <= 2 * 8


def test_map_holds_few_bytes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbir.images._READ_AHEAD_BYTES", 100_000)
    data = encoded(photograph(20, 20), "PNG") + bytes(45_000)  # trailing bytes are allowed
    taken: list[int] = []

    def items() -> Iterator[tuple[int, bytes]]:
        for key in range(10):
            taken.append(key)
            yield key, data

    assert [key for key, _ in decoder.map(items()) if taken[-1] - key <= 2] == list(range(10))


def test_map_can_be_left_early(decoder: Decoder) -> None:
    data = encoded(photograph(20, 20), "PNG")
    mapped = decoder.map((i, data) for i in itertools.count())
    assert next(mapped)[0] == 0
    mapped.close()  # type: ignore[attr-defined]
    assert isinstance(decoder.decode(data), Decoded)


def test_map_of_nothing_and_of_a_broken_source(decoder: Decoder) -> None:
    def broken() -> Iterator[tuple[int, bytes]]:
        yield 0, b""
        raise OSError("the shard ends here")

    assert list(decoder.map(iter([]))) == []
    with pytest.raises(OSError, match="the shard ends here"):
        list(decoder.map(broken()))


def test_many_threads_may_decode(decoder: Decoder) -> None:
    data = [encoded(photograph(50, 40, seed=seed), "PNG") for seed in range(5)]
    expected = [decode(file, SMALL, LIMITS) for file in data]
    with ThreadPoolExecutor(5) as threads:
        for _ in range(5):
            assert all(map(same, threads.map(decoder.decode, data), expected))


def test_a_closed_decoder_says_so() -> None:
    decoder = Decoder(SMALL, LIMITS)
    decoder.close()
    decoder.close()
    with pytest.raises(ValueError, match="closed"):
        decoder.decode(b"")
    with pytest.raises(ValueError, match="at least one"):
        Decoder(SMALL, LIMITS, 0)


@linux
def test_close_ends_the_processes(decoder: Decoder) -> None:
    before = children()
    with Decoder(SMALL, LIMITS, 3):
        eventually(lambda: len(children()) == len(before) + 3)
    assert children() == before


def test_a_decoder_process_imports_little() -> None:
    code = "import sys, cbir._decode_child; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "pyarrow", "torch", "cv2", "faiss", "boto3"} & set(loaded)


def test_too_slow_costs_one_image(heavy: bytes) -> None:
    with Decoder(SMALL, Limits(seconds=0.1)) as decoder:
        assert decoder.decode(heavy) == BadImage("too_slow", "more than 0.1 s of processor time")
        assert isinstance(decoder.decode(encoded(photograph(9, 9), "PNG")), Decoded)


def decoder_and_pid(view: View, limits: Limits) -> tuple[Decoder, int]:
    before = set(children())
    decoder = Decoder(view, limits)
    assert isinstance(decoder.decode(encoded(photograph(9, 9), "PNG")), Decoded)
    (pid,) = set(children()) - before
    return decoder, pid


@linux
def test_a_process_that_hangs_costs_one_image() -> None:
    data = encoded(photograph(9, 9), "PNG")
    decoder, pid = decoder_and_pid(SMALL, Limits(seconds=0.1))
    with decoder:
        os.kill(pid, signal.SIGSTOP)
        assert decoder.decode(data) == BadImage("too_slow", "no answer within 0.5 s")
        assert isinstance(decoder.decode(data), Decoded)
        assert pid not in children()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def is_decoding(pid: int) -> bool:
    return resident_bytes(pid) > 150e6


@linux
def test_a_process_that_crashes_in_the_middle_costs_one_image(heavy: bytes) -> None:
    decoder, pid = decoder_and_pid(SMALL, LIMITS)
    with decoder, ThreadPoolExecutor(1) as thread:
        verdict = thread.submit(decoder.decode, heavy)
        eventually(lambda: is_decoding(pid))
        os.kill(pid, signal.SIGSEGV)
        assert verdict.result() == BadImage("decoder_died", "the decoder was ended by SIGSEGV")
        assert isinstance(decoder.decode(encoded(photograph(9, 9), "PNG")), Decoded)


@linux
def test_an_image_is_blamed_for_the_second_sigkill(heavy: bytes) -> None:
    before = set(children())
    decoder, pid = decoder_and_pid(SMALL, LIMITS)
    with decoder, ThreadPoolExecutor(1) as thread:
        verdict = thread.submit(decoder.decode, heavy)
        eventually(lambda: is_decoding(pid))
        os.kill(pid, signal.SIGKILL)
        second = eventually(lambda: set(children()) - before - {pid}).pop()
        eventually(lambda: is_decoding(second))
        os.kill(second, signal.SIGKILL)
        assert verdict.result() == BadImage("decoder_died", "the decoder was ended by SIGKILL twice")
        eventually(lambda: set(children()) - before - {second})


@linux
def test_one_sigkill_from_outside_costs_nothing() -> None:
    data = encoded(photograph(9, 9), "PNG")
    decoder, pid = decoder_and_pid(SMALL, LIMITS)
    with decoder:
        os.kill(pid, signal.SIGKILL)
        assert same(decoder.decode(data), decode(data, SMALL, LIMITS))


def test_an_interrupt_does_not_give_an_image_the_pixels_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (encoded(photograph(40, 30, seed=seed), "PNG") for seed in range(2))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with Decoder(SMALL, LIMITS) as decoder:
        assert isinstance(decoder.decode(first), Decoded)
        with monkeypatch.context() as patch:
            patch.setattr("cbir._decode_process._read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                decoder.decode(first)
        assert same(decoder.decode(second), decode(second, SMALL, LIMITS))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "TGA"])
def test_damaged_files_end_with_a_verdict(decoder: Decoder, file_format: str) -> None:
    generator = np.random.default_rng(5)
    data = np.frombuffer(encoded(photograph(60, 40), file_format), np.uint8)
    for num_bytes in (1, 3, 10, 30):
        for last in (40, len(data)):  # half of them in the header
            damaged = data.copy()
            damaged[generator.integers(0, last, num_bytes)] = generator.integers(0, 256, num_bytes)
            verdict = decoder.decode(damaged.tobytes())
            assert isinstance(verdict, Decoded) or verdict.reason != "decoder_died", verdict


@linux
def test_too_much_memory_costs_one_image(heavy: bytes) -> None:
    process = DecodeProcess(Terms(64, "longest", 1.0, 10**8, 10**8), memory_bytes=100 << 20, seconds=20)
    try:
        verdict = process.decode(heavy)
        assert isinstance(verdict, BadImage)
        assert verdict.reason == "too_much_memory"
        assert isinstance(process.decode(encoded(photograph(9, 9), "PNG")), Decoded)
    finally:
        process.close()


def test_a_process_that_cannot_start_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Decoder(SMALL, LIMITS) as decoder, pytest.raises(CbirError, match="does not start"):
        decoder.decode(encoded(photograph(9, 9), "PNG"))


@linux
def test_no_process_survives_its_parent() -> None:
    code = """
import sys, time
from cbir.images import Decoder, Limits, View
decoder = Decoder(View(size=8), Limits(), 2)
decoder.decode(b"x"), decoder.decode(b"x")
print(*[process._process.pid for process in (decoder._idle.get(), decoder._idle.get())], flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: all(map(is_gone, pids)))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_hundred_megapixels_pass_the_default_limits(file_format: str) -> None:
    options = {"compress_level": 1} if file_format == "PNG" else {"progressive": True}
    image = Image.new("RGB", (10_000, 10_000), (90, 120, 150))
    image.paste(photograph(1000, 1000), (4000, 4000))
    data = encoded(image, file_format, **options)
    with Decoder(SMALL, LIMITS) as decoder:
        verdict = decoder.decode(data)
    assert isinstance(verdict, Decoded), verdict
    assert verdict.size == (10_000, 10_000)


# --- the corpus of broken, odd and hostile files ---


@pytest.fixture(scope="module")
def corpus(test_data: Path) -> list[dict[str, str]]:
    with (test_data / "corrupt" / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return [row | {"path": str(test_data / "corrupt" / "files" / row["file"])} for row in csv.DictReader(file)]


@linux
def test_every_file_of_the_corpus_ends_decoded_or_with_a_reason(corpus: list[dict[str, str]]) -> None:
    decoder, pid = decoder_and_pid(SMALL, LIMITS)
    with decoder:
        verdicts = dict(decoder.map((row["file"], Path(row["path"]).read_bytes()) for row in corpus))
        assert pid in children(), "no file kills its decoder"
        peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert len(verdicts) == len(corpus) == 107
    assert int(peak.split()[1]) < 400_000, "kB"
    decodable = {row["file"] for row in corpus if row["pillow_result"] == "ok"}
    assert {name for name, verdict in verdicts.items() if isinstance(verdict, Decoded)} == decodable


def test_the_corpus_is_refused_for_the_right_reasons(corpus: list[dict[str, str]]) -> None:
    expected = {
        "truncated_jpeg": {"truncated", "corrupt"},
        "truncated_gif": {"truncated"},
        "dimension_bomb": {"too_many_pixels", "unsupported", "corrupt"},
        "decompression_dos": {"too_much_memory"},
        "12bit_jpeg": {"unsupported"},
        "zero_byte": {"empty"},
        "not_an_image": {"not_an_image"},
        "random_bytes": {"not_an_image"},
        "bitrot_jpeg": {"corrupt"},
        "hdr": {"unsupported"},
        "exr": {"unsupported"},
    }
    for row in corpus:
        if row["kind"] in expected and row["pillow_result"] != "ok":
            assert reason_of(Path(row["path"]).read_bytes()) in expected[row["kind"]], row["file"]
