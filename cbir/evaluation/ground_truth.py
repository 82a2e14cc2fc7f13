"""Ground truth: which images are right answers to which query.

Two kinds of file are read. A CSV has one row per image and role, and relevance follows from shared instances:

    image,instance_id,role[,x,y,w,h | ,box]
    images/cover.jpg,dvd_001,database
    images/phone.jpg,dvd_001;dvd_007,query
    images/tench.jpg,,distractor

A JSON has the form of the revisited Oxford and Paris benchmarks (Radenovic et al. 2018): `imlist`, `qimlist` and `gnd`
with `bbx`, `easy`, `hard` and `junk` (or the classic `ok` and `junk`) per query, as positions in `imlist`.
"""

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cbir.errors import DataError
from cbir.evaluation.renaming import IMAGE_EXTENSIONS, find_renaming, nearest_key
from cbir.spec import nearest

__all__ = ["Box", "GroundTruth", "GroundTruthQuery", "Protocol", "read_ground_truth"]

Protocol = Literal["easy", "medium", "hard"]
Box = tuple[float, float, float, float]
"""x, y, width and height in pixels of the upright image."""

REQUIRED_COLUMNS = ("image", "instance_id", "role")
ROLES = ("database", "query", "both", "distractor")
PICTURE_FOLDERS = ("", "jpg", "images")

_PROTOCOLS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""The graded labels that are positives, and those that are junk (METHODS D-06)."""


@dataclass(frozen=True)
class GroundTruthQuery:
    """One query: its picture, the region that is asked for, and the names of its positives and junk.

    Junk is ignored wherever it is ranked. The query itself is always junk, and so are all query pictures that are not
    part of the database, in case the index holds them.
    """

    image: str
    box: Box | None
    positives: frozenset[str]
    junk: frozenset[str]


@dataclass(frozen=True)
class GroundTruth:
    """The queries of one file. `missing` are the positives that the index does not hold, known once `resolved`."""

    name: str
    folder: Path
    queries: tuple[GroundTruthQuery, ...]
    missing: frozenset[str] = frozenset()

    def resolved(self, keys: Collection[str]) -> "GroundTruth":
        """The same with the file's image names replaced by keys of the index, all by one `Renaming`.

        Positives that are not in the index (quarantined, perhaps) stay, so that they count as misses. Query pictures
        keep the file's names. DataError if most positives are not in the index, or if two renamings are equally good.
        """
        known = keys if isinstance(keys, set | frozenset | Mapping) else frozenset(keys)
        names = frozenset().union(*(query.positives for query in self.queries))
        renaming = find_renaming(names, known, self.folder)
        missing = frozenset(renaming(name) for name in names if renaming(name) not in known)
        if 2 * len(missing) > len(names):
            example = min(name for name in names if renaming(name) not in known)
            raise DataError(
                f"ground truth {self.name!r}: {len(missing)} of {len(names)} positives are not among the {len(known)} "
                f"images of the index, for example {example!r} (nearest key: {nearest_key(example, known)!r}); a key "
                f"must be the file's name with other leading folders or another extension, in one way for all"
            )
        shared: dict[frozenset[str], frozenset[str]] = {}

        def renamed(group: frozenset[str]) -> frozenset[str]:
            if group not in shared:
                shared[group] = frozenset(map(renaming, group))
            return shared[group]

        queries = tuple(replace(q, positives=renamed(q.positives), junk=renamed(q.junk)) for q in self.queries)
        return replace(self, queries=queries, missing=missing)

    def picture(self, query: GroundTruthQuery) -> Path:
        """The file of a query's picture: beside the ground truth, in its `jpg` or `images`, with an image extension."""
        names = [query.image, *(query.image + extension for extension in IMAGE_EXTENSIONS)]
        for folder in PICTURE_FOLDERS:
            for name in names:
                if (path := self.folder / folder / name).is_file():
                    return path
        raise DataError(
            f"ground truth {self.name!r}: no picture of query {query.image!r} in {self.folder} or its folders "
            f"{', '.join(filter(None, PICTURE_FOLDERS))}"
        )


def read_ground_truth(path: str | Path, protocol: Protocol = "medium") -> GroundTruth:
    """Read a CSV or an Oxford-style JSON; `protocol` chooses among graded labels and means nothing to other files.

    DataError names the file, and the line where there is one, for whatever cannot be understood.
    """
    path = Path(path).absolute()
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        queries = tuple(_oxford_queries(path, text, protocol))
    else:
        queries = tuple(_csv_queries(list(_csv_rows(path, text))))
    if not any(query.positives for query in queries):
        raise DataError(f"{path}: none of the {len(queries)} queries has a positive in the database")
    name = path.parent.name if path.stem == "ground_truth" else path.stem
    return GroundTruth(name, path.parent, queries)


def _read_text(path: Path) -> str:
    if path.suffix.lower() in {".pkl", ".pickle"}:
        raise DataError(f"{path}: pickled ground truth can run code and is not read; convert it to JSON")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"ground truth {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


@dataclass(frozen=True)
class _Row:
    line: int
    image: str
    instances: frozenset[str]
    role: str
    box: Box | None


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(text), restval="")
    seen: dict[tuple[str, Box | None], int] = {}
    for cells in _csv_cells(path, reader):
        row = _csv_row(f"{path}, line {reader.line_num}", reader.line_num, cells)
        if row.role in {"query", "both"} and (first := seen.setdefault((row.image, row.box), row.line)) != row.line:
            raise DataError(
                f"{path}, line {row.line}: {row.image!r} is already a query in line {first}; a picture of several "
                f"instances has them in one row, as 'a;b', and one of several regions has a box in each row"
            )
        yield row


def _csv_cells(path: Path, reader: "csv.DictReader[str]") -> Iterator[dict[str, str]]:
    """The cells of every row, if the columns are there that must be."""
    try:
        columns = reader.fieldnames or ()
        for column in REQUIRED_COLUMNS:
            if column not in columns:
                raise DataError(f"{path}: no column {column!r}{nearest(column, columns)}")
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, after line {reader.line_num}: not CSV ({error})") from None


def _csv_row(place: str, line: int, cells: Mapping[str, str]) -> _Row:
    image, role = cells["image"].strip(), cells["role"].strip()
    if not image:
        raise DataError(f"{place}: the image has no name")
    if role not in ROLES:
        raise DataError(f"{place}: unknown role {role!r}{nearest(role, ROLES)}")
    instances = frozenset(part.strip() for part in cells["instance_id"].split(";")) - {"", "none"}
    return _Row(line, image, instances, role, _csv_box(place, cells))


def _csv_box(place: str, cells: Mapping[str, str]) -> Box | None:
    if text := cells.get("box", "").strip():
        parts = re.split(r"[,;\s]+", text)
    else:
        parts = [cells.get(column, "").strip() for column in "xywh"]
    if not any(parts):
        return None
    try:
        x, y, width, height = map(float, parts)
    except ValueError as error:
        raise DataError(f"{place}: a box is four numbers x, y, w, h, found {', '.join(parts)!r}") from error
    return _box(place, x, y, width, height)


def _box(place: str, x: float, y: float, width: float, height: float) -> Box:
    if not (math.isfinite(x + y + width + height) and width > 0 and height > 0):
        raise DataError(f"{place}: the box x={x:g} y={y:g} w={width:g} h={height:g} has no area")
    return x, y, width, height


def _csv_queries(rows: Sequence[_Row]) -> Iterator[GroundTruthQuery]:
    images_of = defaultdict(set)
    for row in rows:
        if row.role in {"database", "both"}:
            for instance in row.instances:
                images_of[instance].add(row.image)
    database = {row.image for row in rows if row.role != "query"}
    # One set for all queries outside of the database: a set each would grow with the square of their number.
    outside = frozenset(row.image for row in rows) - database
    for row in rows:
        if row.role in {"query", "both"}:
            positives = frozenset().union(*(images_of[instance] for instance in row.instances)) - {row.image}
            junk = outside if row.image in outside else outside | {row.image}
            yield GroundTruthQuery(row.image, row.box, positives, junk)


def _oxford_queries(path: Path, text: str, protocol: Protocol) -> Iterator[GroundTruthQuery]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets of too many levels
        raise DataError(f"{path}: not JSON that can be read ({error})") from None
    images, queries = (_oxford_list(path, content, key, str, "names") for key in ("imlist", "qimlist"))
    labels = _oxford_list(path, content, "gnd", dict, "objects")
    if len(queries) != len(labels):
        raise DataError(f"{path}: 'qimlist' has {len(queries)} queries, 'gnd' {len(labels)}")
    outside = frozenset(queries) - frozenset(images)
    for number, (query, label) in enumerate(zip(queries, labels, strict=True)):
        place = f"{path}, query {number} ({query!r})"
        positive, junk = _PROTOCOLS[protocol] if "ok" not in label else (("ok",), ("junk",))
        left_out = outside | {query} | _oxford_names(place, label, junk, images)
        positives = _oxford_names(place, label, positive, images) - left_out
        yield GroundTruthQuery(query, _oxford_box(place, label), positives, left_out)


def _oxford_list(path: Path, content: Any, key: str, kind: type, kinds: str) -> list[Any]:
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with 'imlist', 'qimlist' and 'gnd', found a JSON {content!r:.40}")
    if key not in content:
        raise DataError(f"{path}: no list {key!r}{nearest(key, content)}")
    if not isinstance(values := content[key], list):
        raise DataError(f"{path}: {key!r} must be a list, found {values!r:.40}")
    for position, value in enumerate(values):
        if not isinstance(value, kind):
            raise DataError(f"{path}: {key!r} must be a list of {kinds}, position {position} holds {value!r:.40}")
    return values


def _oxford_names(place: str, label: Mapping[str, Any], grades: Sequence[str], images: Sequence[str]) -> frozenset[str]:
    names = set()
    for grade in grades:
        if grade not in label:
            raise DataError(f"{place}: no label {grade!r}{nearest(grade, label)}")
        if not isinstance(label[grade], list):
            raise DataError(f"{place}: {grade!r} must be a list of positions in imlist, found {label[grade]!r:.40}")
        for position in label[grade]:
            if not isinstance(position, int) or not 0 <= position < len(images):
                raise DataError(f"{place}: {grade!r} has {position!r}, no position in an imlist of {len(images)}")
            names.add(images[position])
    return frozenset(names)


def _oxford_box(place: str, label: Mapping[str, Any]) -> Box | None:
    if (corners := label.get("bbx")) is None:
        return None
    try:
        left, top, right, bottom = map(float, corners)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: 'bbx' is left, top, right, bottom, found {corners!r}") from error
    return _box(place, left, top, right - left, bottom - top)
