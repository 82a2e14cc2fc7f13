"""The commands that look after the versions of an index: verify, list, roll back, delete, unlock, pin, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from pipelines.terminal import IndexOrConfig, VersionOption, err, out, store_of

if TYPE_CHECKING:
    from cbir.versions import Versions

__all__ = ["COMMANDS", "export", "gc", "pin", "rollback", "unlock", "unpin", "verify", "versions"]

Format = Literal["faiss", "parquet"]
ChosenVersion = Annotated[int, typer.Option("--version", help="Which version.", show_default=False)]


def _versions(index: str) -> "Versions":
    from cbir.versions import Versions

    return Versions(store_of(index))


def verify(
    index: IndexOrConfig,
    version: VersionOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget damaged work, so that `cbir index` does it again.")
    ] = False,
) -> None:
    """Read every file of a version and compare it with its record; check that no image is missing.

    A damaged version heals with `cbir verify --repair my-index` and then the `cbir index` that made it.

    Example: `cbir verify s3://indexes/landmarks`
    """
    from cbir.search import searcher_of
    from cbir.verification import check_counts, check_files, forget_damaged
    from cbir.versions import Versions

    store = store_of(index)
    manifest = Versions(store).load(version)
    if repair:
        with Versions(store).writing("cbir verify --repair", err.print):
            for prefix in forget_damaged(store, manifest):
                out.print(f"forgot {prefix}")
        return
    with err.status("reading") as status:
        check_files(store, manifest, lambda file: status.update(f"read {file.key}"))
    check_counts(searcher_of(store, manifest), manifest)
    counts = manifest.counts
    out.print(
        f"version {manifest.version} is whole: {len(manifest.files)} files, {counts['images']:,} images = "
        f"{counts['indexed']:,} indexed + {counts['quarantined']:,} quarantined"
    )


def versions(index: IndexOrConfig) -> None:
    """List the published versions; the current one is marked.

    Example: `cbir versions my-index`
    """
    found = _versions(index)
    current, pinned = found.current(), found.pinned()
    table = Table("", "version", "created", "indexed", "quarantined", "size", "mAP", box=None, header_style="dim")
    for number in found.numbers():
        manifest = found.load(number)
        mark = "*" if current and current.version == number else ""
        quality = manifest.quality.get("map")
        table.add_row(
            mark + ("p" if number in pinned else ""),
            str(number),
            manifest.created,
            f"{manifest.counts['indexed']:,}",
            f"{manifest.counts['quarantined']:,}",
            f"{sum(file.num_bytes for file in manifest.files) / 1e6:,.1f} MB",
            "" if quality is None else f"{quality:.3f}",
        )
    out.print(table)


def rollback(
    index: IndexOrConfig,
    version: Annotated[int, typer.Option("--to", help="The version to go back to.", show_default=False)],
) -> None:
    """Make another version the current one, in one atomic swap.

    Example: `cbir rollback my-index --to 3`
    """
    manifest = _versions(index).rollback(version)
    out.print(f"version {manifest.version} is current")


def gc(
    index: IndexOrConfig,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Keep this many of the newest versions.")] = 3,
    delete: Annotated[
        bool, typer.Option("--delete", help="Really delete; without it, only say what would go.")
    ] = False,
) -> None:
    """Delete what no kept version needs: old versions, unfinished and superseded work. A dry run by default.

    While another run writes to the store it deletes nothing. Versions that it gives up can never be current again.

    Example: `cbir gc my-index --keep 2 --delete`
    """
    from cbir.garbage import garbage, sweep
    from cbir.lease import writer_of

    found = _versions(index)
    if delete:
        with found.writing("cbir gc", err.print) as held:
            sizes = [info.size for info in sweep(found, keep, held)]
        out.print(f"deleted: {len(sizes):,} objects, {sum(sizes) / 1e6:,.1f} MB")
        return
    sizes = [info.size for info in garbage(found, keep)]
    out.print(f"would delete (add --delete): {len(sizes):,} objects, {sum(sizes) / 1e6:,.1f} MB")
    writer = writer_of(found.store)
    if writer is not None and not writer.has_ended():
        err.print(f"this counts what {writer.owner} may be making just now; as long as it writes, nothing is deleted")


def unlock(index: IndexOrConfig) -> None:
    """Let the next run write at once, where the last one died on another machine and its lease still lasts.

    Only for a run that certainly has ended; one that is alive could publish nothing more.

    Example: `cbir unlock s3://indexes/landmarks`
    """
    from cbir.lease import unlock as free

    writer = free(_versions(index).store)
    out.print("nobody held the lease" if writer is None else f"freed the lease of {writer.owner or 'nobody'}")


def pin(index: IndexOrConfig, version: ChosenVersion) -> None:
    """Keep a version through every gc; `cbir unpin` lets it go again.

    Example: `cbir pin my-index --version 3`
    """
    _versions(index).pin(version)
    out.print(f"version {version} is pinned")


def unpin(index: IndexOrConfig, version: ChosenVersion) -> None:
    """Let gc take a pinned version again.

    Example: `cbir unpin my-index --version 3`
    """
    _versions(index).unpin(version)
    out.print(f"version {version} is not pinned")


def export(
    index: IndexOrConfig,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.", show_default=False)],
    form: Annotated[
        Format, typer.Option("--format", help="faiss: one index and its ids; parquet: keys and vectors.")
    ] = "faiss",
    channel: Annotated[str | None, typer.Option("--channel", help="Needed if the index has several.")] = None,
    version: VersionOption = None,
) -> None:
    """Write a version as plain files: one faiss index with ids, or Parquet ready for Lance or Milvus.

    Example: `cbir export my-index exported --format parquet`
    """
    from cbir.versions import Versions
    from pipelines.export import export as run_export

    store = store_of(index)
    for path in run_export(store, Versions(store).load(version), folder, channel, form):
        out.print(str(path), soft_wrap=True)


COMMANDS = (verify, versions, rollback, gc, unlock, pin, unpin, export)
"""In the order in which the help lists them."""
