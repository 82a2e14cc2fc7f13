"""From the image names of a ground-truth file to the keys of an index.

A key is a path relative to where the user's collection starts, which is often not where the ground-truth file starts:
`images/a.jpg` in the file may be `a.jpg`, `paintings/images/a.jpg` or `images/a` in the index. One renaming is chosen
for the whole file, because a choice per name would turn two pictures of one file name into each other.
"""

import difflib
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cbir.errors import DataError

__all__ = ["IMAGE_EXTENSIONS", "Renaming", "find_renaming", "nearest_key"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".avif", ".ppm", ".pgm")
PROBED_NAMES = 200
WEIGHED_RENAMINGS = 50
COMPARED_KEYS = 5000


@dataclass(frozen=True)
class Renaming:
    """Strip leading folders, put one prefix before what is left, and exchange the extension (None keeps it)."""

    strip: int = 0
    prefix: str = ""
    extension: str | None = None

    def __call__(self, name: str) -> str:
        """The key of a name; the last component is never stripped."""
        parts = name.split("/")
        tail = "/".join(parts[min(self.strip, len(parts) - 1) :])
        return self.prefix + (tail if self.extension is None else _split_extension(tail)[0] + self.extension)


def find_renaming(names: Collection[str], keys: Collection[str], folder: Path) -> Renaming:
    """The renaming that turns most names into keys; among equals the one that changes least.

    Among equally good prefixes the one that ends the path of the ground truth's folder is right; if there is none,
    the choice would be a guess: DataError names both.
    """
    likely = [Renaming()]
    if not all(name in keys for name in names):
        likely += [renaming for renaming, _ in _candidates(names, keys).most_common(WEIGHED_RENAMINGS)]
    # Distinct keys: a renaming that makes one key of `day/1.jpg` and `night/1.jpg` must not count it twice.
    weighed = [(sum(key in keys for key in set(map(renaming, names))), renaming) for renaming in likely]
    weighed.sort(key=lambda pair: (-pair[0], *_changes(pair[1], folder)))
    found, best = weighed[0]
    for other in (renaming for count, renaming in weighed[1:] if count == found):
        guess = best.prefix and other.prefix and not _ends_folder(best.prefix, folder)
        if guess and any(best(name) != other(name) for name in names):
            raise DataError(
                f"{found} names of the ground truth in {folder} are keys of the index both under {best.prefix!r} and "
                f"under {other.prefix!r}; move the file so that its names, or its folder, tell which are meant"
            )
    return best


def nearest_key(name: str, keys: Collection[str]) -> str | None:
    """The most similar key: among those of the same file name if there are any, else among the first few thousand."""
    file_name = name.rpartition("/")[2]
    pool = [key for key in keys if key.endswith(file_name)] or sorted(keys)
    return next(iter(difflib.get_close_matches(name, pool[:COMPARED_KEYS], n=1, cutoff=0.0)), None)


def _changes(renaming: Renaming, folder: Path) -> tuple[bool, bool, int, int, str, str]:
    wrong_folder = bool(renaming.prefix) and not _ends_folder(renaming.prefix, folder)
    extension = renaming.extension
    return (
        extension is not None,
        wrong_folder,
        renaming.strip,
        renaming.prefix.count("/"),
        renaming.prefix,
        extension or "",
    )


def _ends_folder(prefix: str, folder: Path) -> bool:
    parts = PurePosixPath(prefix).parts
    return folder.parts[-len(parts) :] == parts


def _candidates(names: Collection[str], keys: Collection[str]) -> Counter[Renaming]:
    """How many of the probed names each renaming turns into a key."""
    same_stem = _keys_of_same_stem(names, keys)
    # Names with the fewest namesakes say most, and keep `0001.jpg` in ten thousand folders from costing anything.
    telling = sorted((name for name in names if _stem(name) in same_stem), key=lambda n: (len(same_stem[_stem(n)]), n))
    votes: Counter[Renaming] = Counter()
    for name in telling[:PROBED_NAMES]:
        # Sorted, because the keys may come out of a set, whose order changes from process to process.
        votes.update(renaming for key in sorted(same_stem[_stem(name)]) for renaming in _renamings(name, key))
    return votes


def _keys_of_same_stem(names: Collection[str], keys: Collection[str]) -> Mapping[str, Sequence[str]]:
    stems = set(map(_stem, names))
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key in keys:
        if (stem := _stem(key)) in stems:
            groups[stem].append(key)
    return groups


def _renamings(name: str, key: str) -> Iterator[Renaming]:
    """Every renaming that turns this name into this key."""
    (name_stem, name_extension), (key_stem, key_extension) = _split_extension(name), _split_extension(key)
    extension = None if name_extension == key_extension else key_extension
    name_parts, key_parts = name_stem.split("/"), key_stem.split("/")
    backwards = zip(reversed(name_parts), reversed(key_parts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], backwards))
    for kept in range(1, common + 1):
        prefix = "".join(f"{part}/" for part in key_parts[:-kept])
        yield Renaming(len(name_parts) - kept, prefix, extension)


def _split_extension(name: str) -> tuple[str, str]:
    stem, dot, extension = name.rpartition(".")
    return (stem, dot + extension) if dot and (dot + extension).lower() in IMAGE_EXTENSIONS else (name, "")


def _stem(name: str) -> str:
    return _split_extension(name.rpartition("/")[2])[0]
