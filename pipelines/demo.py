"""The demo collection: real photographs, seen through random cameras, in the shape of a user's own collection.

    python -m pipelines.demo FOLDER

writes FOLDER/images/shard-0000.tar ... (webdataset-style tar shards), FOLDER/queries/*.jpg, FOLDER/ground_truth.csv
(image, instance_id, role) and FOLDER/CREDITS.txt. The pictures come out of the installed packages of scikit-image,
scikit-learn and matplotlib: nothing is downloaded, and `PHOTOGRAPHS` and `SURFACES` name author and licence of each.

An *object* is one photograph. The database holds a clean reference of it and views: a print of it, tilted, turned, cut
off by the frame, in other light, out of focus, before a random surface, saved as JPEG. Queries are further views. The
queries of the motorcycle are made of the right picture of a stereo pair, its database images of the left one: a
real change of viewpoint. Distractors are views of prints of parts of the surfaces.
"""

import argparse
import csv
import importlib.util
import io
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from cbir.errors import CbirError, DataError

__all__ = ["PHOTOGRAPHS", "SURFACES", "Source", "make_collection"]

Corners = npt.NDArray[np.float64]
"""Four points (4, 2), x and y in pixels: top left, top right, bottom right, bottom left."""

NUM_SHARDS = 4
FRAMES = [(400, 300), (300, 400), (360, 360)]


@dataclass(frozen=True)
class Source:
    """A picture inside an installed package; the last of its files is what queries are made of."""

    name: str
    package: str
    files: tuple[str, ...]
    credit: str

    def pictures(self) -> list[Image.Image]:
        """The RGB pictures of its files."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the demo needs pictures of the package {self.package}: pip install -e '.[demo]'")
        folder = Path(spec.submodule_search_locations[0])
        return [_read(folder / file) for file in self.files]


PHOTOGRAPHS = [
    Source("astronaut", "skimage", ("data/astronaut.png",), "Eileen Collins; NASA, public domain"),
    Source("camera", "skimage", ("data/camera.png",), "Lav Varshney, CC0"),
    Source("cat", "skimage", ("data/chelsea.png",), "Stefan van der Walt, CC0"),
    Source("china", "sklearn", ("datasets/images/china.jpg",), "flickr.com/photos/danielbuechele, CC BY 2.0"),
    Source("coffee", "skimage", ("data/coffee.png",), "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"),
    Source("coins", "skimage", ("data/coins.png",), "Brooklyn Museum, no known copyright restrictions"),
    Source("flower", "sklearn", ("datasets/images/flower.jpg",), "flickr.com/photos/vultilion, CC BY 2.0"),
    Source("hopper", "matplotlib", ("mpl-data/sample_data/grace_hopper.jpg",), "Grace Hopper; US Navy, public domain"),
    Source(
        "motorcycle",
        "skimage",
        ("data/motorcycle_left.png", "data/motorcycle_right.png"),
        "Middlebury stereo benchmark; Scharstein et al., GCPR 2014",
    ),
    Source("rocket", "skimage", ("data/rocket.jpg",), "SpaceX, public domain"),
]
"""The objects."""

SURFACES = [
    Source("brick", "skimage", ("data/brick.png",), "cc0textures.com, CC0"),
    Source("cell", "skimage", ("data/cell.png",), "Mueller et al., Optics Express 2018, CC0"),
    Source("galaxies", "skimage", ("data/hubble_deep_field.jpg",), "Hubble deep field; NASA, public domain"),
    Source("grass", "skimage", ("data/grass.png",), "cc0textures.com, CC0"),
    Source("gravel", "skimage", ("data/gravel.png",), "cc0textures.com, CC0"),
    Source("handwriting", "skimage", ("data/text.png",), "Wikipedia File:Corner.png, public domain"),
    Source("moon", "skimage", ("data/moon.png",), "sample data of scikit-image"),
    Source("page", "skimage", ("data/page.png",), "sample data of scikit-image"),
    Source("retina", "skimage", ("data/retina.jpg",), "Wikimedia, CC0"),
    Source(
        "tissue", "skimage", ("data/ihc.png",), "Center for Microscopy and Molecular Imaging, no known restrictions"
    ),
]
"""What distractors and backgrounds are made of."""


def make_collection(folder: Path, seed: int = 0, views: int = 12, distractors: int = 180) -> None:
    """Write the collection; of the views of each object every third is a query, the others join the database.

    The same arguments give the same bytes. Raises DataError where the folder already holds a collection, so that
    shards of two collections never mix, and where a package with pictures is not installed.
    """
    taken = [name for name in ("images", "queries", "ground_truth.csv") if (folder / name).exists()]
    if taken:
        raise DataError(f"{folder} already holds {', '.join(taken)}: remove that, or name an empty folder")
    if views < 0 or distractors < 0:
        raise ValueError(f"views and distractors cannot be negative, found {views} and {distractors}")
    surfaces = [picture for source in SURFACES for picture in source.pictures()]
    database, queries = [], []
    for source in PHOTOGRAPHS:
        objects = list(_object_images(source, surfaces, seed, views))
        database += [image for image in objects if image.role == "database"]
        queries += [image for image in objects if image.role == "query"]
    database += _distractor_images(surfaces, seed, distractors)
    _write_shards(folder / "images", database, np.random.default_rng([seed, NUM_SHARDS]))
    _write_queries(folder, queries)
    _write_credits(folder / "CREDITS.txt")
    # Last, so that its presence says that the collection is whole.
    _write_ground_truth(folder / "ground_truth.csv", database + queries)


@dataclass(frozen=True)
class _Picture:
    """One image of the collection: `key` is its tar member, or its path beside the ground truth."""

    key: str
    instance_id: str
    role: str
    jpeg: bytes


def _object_images(source: Source, surfaces: Sequence[Image.Image], seed: int, views: int) -> Iterator[_Picture]:
    pictures = source.pictures()
    yield _Picture(f"{source.name}-reference.jpg", source.name, "database", _jpeg(pictures[0], 92))
    for number in range(views):
        is_query = number % 3 == 2
        name = f"{source.name}-view-{number:02d}.jpg"
        jpeg = _view(pictures[-1 if is_query else 0], surfaces, _generator(seed, name))
        if is_query:
            yield _Picture(f"queries/{name}", source.name, "query", jpeg)
        else:
            yield _Picture(name, source.name, "database", jpeg)


def _distractor_images(surfaces: Sequence[Image.Image], seed: int, count: int) -> Iterator[_Picture]:
    for number in range(count):
        name = f"distractor-{number:04d}.jpg"
        rng = _generator(seed, name)
        part = _random_part(surfaces[number % len(surfaces)], rng)
        yield _Picture(name, "", "distractor", _view(part, surfaces, rng))


def _generator(seed: int, name: str) -> np.random.Generator:
    """One generator per image: how many others there are never changes an image."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _view(picture: Image.Image, surfaces: Sequence[Image.Image], rng: np.random.Generator) -> bytes:
    """The JPEG that a random camera takes of a print of the picture before a random surface."""
    frame = FRAMES[rng.integers(len(FRAMES))]
    image = _background(surfaces[int(rng.integers(len(surfaces)))], frame, rng)
    paper, mask = _perspective(picture, _random_corners(picture.size, frame, rng), frame)
    image.paste(paper, mask=mask)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))
    return _jpeg(_light(image, rng), int(rng.integers(40, 91)))


def _random_corners(size: tuple[int, int], frame: tuple[int, int], rng: np.random.Generator) -> Corners:
    """Where the corners of the frame lie on the picture, in its pixels; they may lie outside of it."""
    half = np.array(frame) / 2
    # A zoom of 1 fits the whole picture into the frame; below it the frame cuts the picture off.
    zoom = max(size[0] / frame[0], size[1] / frame[1]) * rng.uniform(0.5, 2.0)
    angle = np.deg2rad(rng.uniform(-45, 45))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half * zoom
    tilted = corners * (1 + rng.uniform(-0.2, 0.2, (4, 2)))
    centre = np.array(size) * rng.uniform(0.38, 0.62, 2)
    return np.asarray(tilted @ turn.T + centre, np.float64)


def _perspective(picture: Image.Image, corners: Corners, frame: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The picture as the frame sees it, and the mask of where it is."""
    width, height = frame
    shrink = max(1.0, float(np.linalg.norm(corners[1] - corners[0])) / width)
    small = picture.resize((round(picture.width / shrink), round(picture.height / shrink)), Image.Resampling.LANCZOS)
    seen = corners * (np.array(small.size) / np.array(picture.size))
    data = _homography(np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64), seen)
    whole = Image.new("L", small.size, 255)
    paper = small.transform(frame, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC)
    return paper, whole.transform(frame, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR)


def _homography(here: Corners, there: Corners) -> list[float]:
    """The eight numbers a to h of x' = (ax + by + c) / (gx + hy + 1), y' = (dx + ey + f) / (gx + hy + 1)."""
    rows = []
    for (x, y), (u, v) in zip(here, there, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return [float(value) for value in np.linalg.solve(np.array(rows), there.ravel())]


def _background(surface: Image.Image, frame: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A part of the surface, out of focus: the camera looks at the print before it."""
    focus = rng.uniform(2, 4)
    part = _random_part(surface, rng).resize((round(frame[0] / focus), round(frame[1] / focus)))
    return part.resize(frame)


def _random_part(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random rectangle of 0.35 to 0.8 of the sides, turned by a multiple of 90 degrees or mirrored."""
    width, height = (round(side * rng.uniform(0.35, 0.8)) for side in picture.size)
    left, top = int(rng.integers(picture.width - width)), int(rng.integers(picture.height - height))
    part = picture.crop((left, top, left + width, top + height))
    return part.transpose(list(Image.Transpose)[rng.integers(len(Image.Transpose))])


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gamma, and gain and bias of each channel."""
    gamma = np.exp(rng.uniform(-0.4, 0.4))
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, (3, 1))
    curve = np.linspace(0, 1, 256) ** gamma
    values = 255 * gain * curve + rng.uniform(-15, 25)
    return image.point(np.clip(values, 0, 255).round().astype(int).ravel().tolist())


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write_shards(folder: Path, images: Sequence[_Picture], rng: np.random.Generator) -> None:
    """Shuffled, so that no shard holds one object only; with fixed times and owners, so that bytes repeat."""
    folder.mkdir(parents=True)
    order = rng.permutation(len(images))
    for number, part in enumerate(np.array_split(order, NUM_SHARDS)):
        with tarfile.open(folder / f"shard-{number:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
            for i in part:
                member = tarfile.TarInfo(images[i].key)
                member.size = len(images[i].jpeg)
                shard.addfile(member, io.BytesIO(images[i].jpeg))


def _write_queries(folder: Path, queries: Sequence[_Picture]) -> None:
    (folder / "queries").mkdir()
    for query in queries:
        (folder / query.key).write_bytes(query.jpeg)


def _write_credits(path: Path) -> None:
    lines = [f"{source.name}: {source.credit} ({source.package})\n" for source in PHOTOGRAPHS + SURFACES]
    path.write_text("The pictures of this collection were made of\n\n" + "".join(lines), encoding="utf-8")


def _write_ground_truth(path: Path, images: Sequence[_Picture]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "instance_id", "role"])
        writer.writerows([image.key, image.instance_id, image.role] for image in images)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the collection into the folder of the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo", description="Make the demo collection.")
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--seed", type=_count, default=0, help="another seed, other cameras (default: %(default)s)")
    parser.add_argument("--views", type=_count, default=12, help="views per object (default: %(default)s)")
    parser.add_argument("--distractors", type=_count, default=180, help="images of no object (default: %(default)s)")
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    try:
        make_collection(**options)
    except (CbirError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
