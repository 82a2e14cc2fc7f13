"""The command that takes images out of all results at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cbir.errors import ConfigError
from pipelines.terminal import IndexOrConfig, out, store_of

__all__ = ["delete"]


def delete(
    index: IndexOrConfig,
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys of images.")] = None,
    listed: Annotated[Path | None, typer.Option("--from", help="A text file with a key in every line.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Show these images again.")] = False,
) -> None:
    """Take images out of all results at once, for good; nothing is merged or read again.

    They stay out in every later version, until `--undo`, also while they lie in the collection. Their files leave the
    index when they leave the collection and `cbir reindex` runs.

    Example: `cbir delete my-index party/me.jpg holiday/12.jpg`
    """
    from cbir.hidden import Hidden
    from cbir.versions import Versions
    from pipelines.hiding import check_indexed, hidden_in, hide

    wanted = [*(keys or ()), *(_lines(listed) if listed else ())]
    if not wanted:
        raise ConfigError("no keys: name some, or give a file with --from")
    versions = Versions(store_of(index))
    with versions.writing("cbir delete") as held:
        hidden = hidden_in(versions.store, versions.load())
        if not undo:
            check_indexed(versions, wanted)
        asked = set(hidden.asked) - set(wanted) if undo else {*hidden.asked, *wanted}
        manifest = hide(versions, Hidden.of(asked, hidden.gone), held)
    out.print(f"version {manifest.version} is current; it hides {manifest.counts['hidden']:,} images")


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from filter(None, path.read_text().splitlines())
    except OSError as error:
        raise ConfigError(f"--from: cannot read {path}: {error.strerror}") from None
