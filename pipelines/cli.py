"""The command line `cbir`. Exit code 0 only if what was asked for happened.

1: it could not be done (the message says why and what to do), 2: the command or the configuration is wrong,
130: interrupted. Heavy libraries are imported by the commands that need them, so that help is immediate.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from cbir.errors import CbirError, ConfigError

if TYPE_CHECKING:
    from cbir.config import Config
    from cbir.search import Box, Result, Searcher
    from cbir.storage import Store
    from cbir.versions import Versions

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """The commands; every expected error of one becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            _fail(str(error), 2)
        except CbirError as error:
            _fail(str(error), 1)
        except OSError as error:
            if error.filename is None:  # none of a file that the user named, such as a closed pipe
                raise
            _fail(f"{error.filename}: {error.strerror}", 1)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to go on", 130)


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"error: {message}", soft_wrap=True)
    raise typer.Exit(code)


app = typer.Typer(
    name="cbir",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Index image collections for instance retrieval, search them, and measure the search.

    From pictures to answers:

        cbir check    configs/quickstart.yaml --images ~/Pictures --store my-index

        cbir index    configs/quickstart.yaml --images ~/Pictures --store my-index

        cbir search   my-index holiday.jpg --html result.html

        cbir evaluate my-index --ground-truth queries.csv
    """,
)

# What is printed are keys, paths and messages: nothing in them is markup.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML file; see configs/ for examples.", show_default=False)
]
IndexOrConfig = Annotated[
    str,
    typer.Argument(
        metavar="INDEX", help="A store (folder or s3:// URI), or the YAML that names it.", show_default=False
    ),
]
Images = Annotated[
    list[str] | None, typer.Option("--images", help="Use this source instead of the YAML's; repeatable.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Use this store instead of the YAML's.")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Worker processes; 0 works in this process.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override any key: --set sample.images=1000.")
]
Protocol = Literal["easy", "medium", "hard"]
Format = Literal["faiss", "parquet"]
VersionOption = Annotated[int | None, typer.Option("--version", help="Use this version instead of the current one.")]

ChosenVersion = Annotated[int, typer.Option("--version", help="Which version.", show_default=False)]


def _config(
    path: Path, images: list[str] | None, store: str | None, workers: int | None, sets: list[str] | None
) -> "Config":
    from cbir.config import load_config

    overrides = list(sets or [])
    overrides += [f"images={json.dumps(images)}"] if images else []
    overrides += [f"store={json.dumps(store)}"] if store is not None else []
    overrides += [f"workers={workers}"] if workers is not None else []
    return load_config(path, overrides)


def _store(index: str) -> "Store":
    """The store that a YAML names, or that the argument is."""
    from cbir.storage import open_store

    if index.endswith((".yaml", ".yml")):
        from cbir.config import load_config

        return open_store(load_config(index).store)
    if "://" not in index and not Path(index).is_dir():
        raise ConfigError(f"{index} is neither a folder with an index nor a YAML file")
    return open_store(index)


def _searcher(store: "Store", version: int | None) -> "Searcher":
    from cbir.search import open_version
    from pipelines.work import limit_threads

    limit_threads()
    return open_version(store.uri, version)


def _versions(index: str) -> "Versions":
    from cbir.versions import Versions

    return Versions(_store(index))


@app.command()
def check(
    config: ConfigFile, images: Images = None, store: StoreOption = None, workers: Workers = None, sets: Set = None
) -> None:
    """Validate a configuration, list its images, and estimate memory, disk and time. Writes nothing.

    Example: `cbir check configs/sift_vlad.yaml --images s3://photos/landmarks/`
    """
    from pipelines.estimates import estimate

    found = estimate(_config(config, images, store, workers, sets))
    table = Table("what", "estimate", "basis", box=None, header_style="dim")
    for line in found.lines:
        table.add_row(line.what, line.value, line.basis)
    out.print(table)


@app.command()
def index(
    config: ConfigFile,
    images: Images = None,
    store: StoreOption = None,
    workers: Workers = None,
    sets: Set = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.html into this folder.")] = None,
) -> None:
    """Build an index and publish it as a new version; after an interruption, go on where it stopped.

    Only missing work is done: running the same command twice publishes once.

    Example: `cbir index configs/quickstart.yaml --images ~/Pictures --store my-index`
    """
    from pipelines.indexing import index as run_index
    from pipelines.progress import RunProgress

    settings = _config(config, images, store, workers, sets)
    with RunProgress(err) as progress:
        manifest = run_index(settings, progress)
    counts = manifest.counts
    out.print(
        f"version {manifest.version} of {settings.store}: {counts['indexed']:,} images indexed, "
        f"{counts['quarantined']:,} quarantined, {counts['partitions']} partition(s)"
    )
    _print_quality(manifest.quality)
    if report is not None:
        from cbir.search import open_version
        from cbir.storage import open_store
        from pipelines.reporting import write_evaluation

        searcher = open_version(settings.store, manifest.version)
        out.print(str(write_evaluation(report, open_store(settings.store), searcher, None, progress.stages)))


def _print_quality(quality: Any) -> None:
    for channel, recalls in quality.get("ann_recall", {}).items():
        if not recalls:
            continue
        named = "  ".join(f"recall@{depth} {recall:.3f}" for depth, recall in recalls.items())
        out.print(f"{channel} against exact search: {named}")
    if "map" in quality:
        out.print(f"mAP {quality['map']:.3f}  recall@1 {quality['recall_at_1']:.3f}")


@app.command()
def search(
    index: IndexOrConfig,
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="The query picture.", show_default=False)],
    box: Annotated[
        str | None, typer.Option("--box", metavar="X,Y,W,H", help="Search for this part of it, in pixels.")
    ] = None,
    depth: Annotated[int, typer.Option("--depth", min=1, help="How many results.")] = 10,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with pictures and verified matches.")
    ] = None,
    version: VersionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per result.")] = False,
) -> None:
    """Find the indexed images that show what a picture shows.

    Example: `cbir search my-index holiday.jpg --box 120,40,300,300 --html result.html`
    """

    region = _box(box)
    searcher = _searcher(_store(index), version)
    answer = searcher.answer([picture], [region], depth)
    _print_results(answer.results(0), as_json)
    if html is not None:
        from pipelines.reporting import write_search

        write_search(html, searcher, picture.read_bytes(), answer, region, picture.name)
        err.print(f"wrote {html}")


def _box(text: str | None) -> "Box | None":
    if text is None:
        return None
    try:
        x, y, width, height = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--box must be X,Y,W,H in pixels, found {text!r}") from None
    return x, y, width, height


def _print_results(results: "list[Result]", as_json: bool) -> None:
    if as_json:
        for result in results:
            print(json.dumps({"key": result.key, "score": result.score, "channels": dict(result.channels)}))
        return
    for rank, result in enumerate(results, start=1):
        out.print(f"{rank:>4}  {result.score:9.4f}  {result.key}", soft_wrap=True)


@app.command()
def evaluate(
    index: IndexOrConfig,
    ground_truth: Annotated[
        str | None, typer.Option("--ground-truth", help="CSV or Oxford-style JSON; default: the YAML's.")
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option("--protocol", help="For graded labels of a JSON; default: the YAML's.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")
    ] = None,
    report: Annotated[Path, typer.Option("--report", help="Folder for report.html and report.json.")] = Path("report"),
    version: VersionOption = None,
) -> None:
    """Measure a version against ground truth: mAP, mP@k, recall@k, time per query; with a page of pictures.

    Example: `cbir evaluate my-index --ground-truth queries.csv --json figures.json`
    """
    from pipelines.quality import judge
    from pipelines.reporting import search_figures, write_evaluation

    store = _store(index)
    searcher = _searcher(store, version)
    settings = searcher.config.evaluate
    if index.endswith((".yaml", ".yml")):
        from cbir.config import load_config

        settings = load_config(index).evaluate
    truth = ground_truth or settings.ground_truth
    if truth is None:
        raise ConfigError("no ground truth: give --ground-truth FILE, or set evaluate.ground_truth in the YAML")
    with err.status("searching") as status:
        judged = judge(
            searcher, truth, protocol or settings.protocol, lambda done, total: status.update(f"{done}/{total} queries")
        )
    figures = {
        **judged.quality.to_json(),
        **asdict(search_figures(searcher.manifest, judged)),
        "ann_recall": searcher.manifest.quality.get("ann_recall", {}),
        "version": searcher.manifest.version,
    }
    _print_figures(figures)
    page = write_evaluation(report, store, searcher, judged)
    if as_json is not None:
        as_json.write_text(json.dumps(figures, indent=2) + "\n")
    out.print(str(page), soft_wrap=True)


def _print_figures(figures: dict[str, Any]) -> None:
    table = Table("figure", "value", box=None, header_style="dim")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    out.print(table)


@app.command()
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

    store = _store(index)
    manifest = Versions(store).load(version)
    if repair:
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


@app.command()
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


@app.command()
def rollback(
    index: IndexOrConfig,
    version: Annotated[int, typer.Option("--to", help="The version to go back to.", show_default=False)],
) -> None:
    """Make another version the current one, in one atomic swap.

    Example: `cbir rollback my-index --to 3`
    """
    manifest = _versions(index).rollback(version)
    out.print(f"version {manifest.version} is current")


@app.command()
def gc(
    index: IndexOrConfig,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Keep this many of the newest versions.")] = 3,
    delete: Annotated[
        bool, typer.Option("--delete", help="Really delete; without it, only say what would go.")
    ] = False,
) -> None:
    """Delete what no kept version needs: old versions, unfinished and superseded work. A dry run by default.

    Example: `cbir gc my-index --keep 2 --delete`
    """
    found = _versions(index)
    number = size = 0
    for key, num_bytes in found.garbage(keep):
        if delete:
            found.store.delete(key)
        number, size = number + 1, size + num_bytes
    verb = "deleted" if delete else "would delete (add --delete)"
    out.print(f"{verb}: {number:,} objects, {size / 1e6:,.1f} MB")


@app.command()
def pin(index: IndexOrConfig, version: ChosenVersion) -> None:
    """Keep a version through every gc; `cbir unpin` lets it go again.

    Example: `cbir pin my-index --version 3`
    """
    _versions(index).pin(version)
    out.print(f"version {version} is pinned")


@app.command()
def unpin(index: IndexOrConfig, version: ChosenVersion) -> None:
    """Let gc take a pinned version again.

    Example: `cbir unpin my-index --version 3`
    """
    _versions(index).unpin(version)
    out.print(f"version {version} is not pinned")


@app.command()
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

    store = _store(index)
    for path in run_export(store, Versions(store).load(version), folder, channel, form):
        out.print(str(path), soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration, with which an editor completes and checks the YAML.

    Example: `cbir schema > cbir.schema.json`
    """
    from cbir.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def methods(
    role: Annotated[str | None, typer.Argument(help="Only this role: extractor, encoder, index ...")] = None,
) -> None:
    """List every registered method with its paper and its fields.

    Example: `cbir methods encoder`
    """
    import cbir.config  # noqa: F401 - registers all methods
    from cbir.spec import methods as registered
    from cbir.spec import nearest, roles

    if role is not None and role not in roles():
        raise ConfigError(f"no role {role!r}{nearest(role, roles())}")
    for name in [role] if role else roles():
        table = Table("name", "fields", "paper", title=name, title_justify="left", box=None, header_style="dim")
        for method in registered(name).values():
            fields = {key: field for key, field in method.model_fields.items() if key != "name"}
            described = (
                f"{key} (required)"
                if field.is_required()
                else f"{key} ({field.get_default(call_default_factory=True)})"
                for key, field in fields.items()
            )
            table.add_row(method.model_fields["name"].default, "\n".join(described), method.paper)
        out.print(table)
        out.print()


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
