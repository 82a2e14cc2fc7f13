"""The command line `cbir`. Exit code 0 only if what was asked for happened.

1: it could not be done (the message says why and what to do), 2: the command or the configuration is wrong,
130: interrupted. Heavy libraries are imported by the commands that need them, so that help is immediate.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from cbir.errors import ConfigError
from pipelines import logs, maintenance
from pipelines.bench_query import bench_query
from pipelines.compare import compare
from pipelines.deletion import delete
from pipelines.evaluate import evaluate
from pipelines.history import runs
from pipelines.serve import serve
from pipelines.terminal import Commands, IndexOrConfig, VersionOption, err, open_searcher, out, printable, store_of
from pipelines.watching import MetricsFileOption, MetricsPortOption, display, watched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cbir.config import Config
    from cbir.queries import Box
    from cbir.search import Result
    from cbir.versions import Manifest
    from pipelines.estimates import Line
    from pipelines.runs import WatchedRun

__all__ = ["app", "main"]

app = typer.Typer(
    name="cbir",
    cls=Commands,
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

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML file; see configs/ for examples.", show_default=False)
]
Images = Annotated[
    list[str] | None, typer.Option("--images", help="Use this source instead of the YAML's; repeatable.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Use this store instead of the YAML's.")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Worker processes; 0 works in this process.")]
Hold = Annotated[
    bool,
    typer.Option(
        "--hold",
        help="Leave readers where they are: look at the new version with `cbir compare`, switch with `cbir rollback`.",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override any key: --set sample.images=1000.")
]


@app.callback()
def _common(
    ctx: typer.Context,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option("--log-format", envvar="CBIR_LOG_FORMAT", help="json: one object a line on the error stream."),
    ] = "text",
) -> None:
    """What holds for every command."""
    if log_format == "json":
        ctx.call_on_close(logs.log_json())


def _config(
    path: Path, images: list[str] | None, store: str | None, workers: int | None, sets: list[str] | None
) -> "Config":
    from cbir.config import load_config

    overrides = list(sets or [])
    overrides += [f"images={json.dumps(images)}"] if images else []
    overrides += [f"store={json.dumps(store)}"] if store is not None else []
    overrides += [f"workers={workers}"] if workers is not None else []
    return load_config(path, overrides)


@app.command()
def check(
    config: ConfigFile,
    images: Images = None,
    store: StoreOption = None,
    workers: Workers = None,
    sets: Set = None,
    scale: Annotated[
        float | None, typer.Option("--scale", min=1, help="Also say what so many images like these would need: 1e9.")
    ] = None,
    machine_workers: Annotated[int, typer.Option(min=1, help="With --scale: workers of a machine.")] = 16,
    machine_gb: Annotated[float, typer.Option(min=1, help="With --scale: memory of a machine, 10^9 bytes.")] = 64,
    price: Annotated[
        float | None, typer.Option(min=0, help="With --scale: of a machine for an hour, in any currency.")
    ] = None,
) -> None:
    """Validate a configuration, list its images, and estimate memory, disk and time. Writes nothing.

    Example: `cbir check configs/sift_vlad.yaml --images s3://photos/landmarks/`

    Example: `cbir check configs/cluster.yaml --images sample/ --scale 1e9 --workers 256 --price 0.80`
    """
    from pipelines.estimates import estimate
    from pipelines.scale import Scale, at_scale

    settings = _config(config, images, store, workers, sets)
    found = estimate(settings)
    _print_lines(found.lines)
    if scale is not None:
        out.print()
        _print_lines(at_scale(settings, found, Scale(round(scale), machine_workers, machine_gb, price)))


def _print_lines(lines: "Sequence[Line]") -> None:
    table = Table("what", "estimate", "basis", box=None, header_style="dim")
    for line in lines:
        table.add_row(line.what, line.value, line.basis)
    out.print(table)


@app.command()
def index(
    config: ConfigFile,
    images: Images = None,
    store: StoreOption = None,
    workers: Workers = None,
    sets: Set = None,
    hold: Hold = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.html into this folder.")] = None,
    metrics_file: MetricsFileOption = None,
    metrics_port: MetricsPortOption = None,
) -> None:
    """Build an index and publish it as a new version; after an interruption, go on where it stopped.

    Only missing work is done: running the same command twice publishes once. `cbir runs` lists what was run.

    Example: `cbir index configs/quickstart.yaml --images ~/Pictures --store my-index`

    Example: `cbir index configs/cluster.yaml --metrics-file /var/lib/node_exporter/textfile/cbir.prom`
    """
    from pipelines.indexing import index as run_index

    settings = _config(config, images, store, workers, sets)
    with watched("index", settings, metrics_file, metrics_port) as run:
        manifest = run_index(settings, run, hold=hold)
        run.published(manifest)
    _print_version(settings, manifest)
    _write_report(report, settings, manifest, run)


def _print_version(settings: "Config", manifest: "Manifest") -> None:
    counts = manifest.counts
    out.print(
        f"version {manifest.version} of {settings.store}: {counts['indexed']:,} images indexed, "
        f"{counts['quarantined']:,} quarantined, {counts['partitions']} partition(s)"
    )
    _print_quality(manifest.quality)


def _write_report(folder: Path | None, settings: "Config", manifest: "Manifest", run: "WatchedRun") -> None:
    if folder is None:
        return
    from cbir.search import open_version
    from cbir.storage import open_store
    from pipelines.reporting import write_evaluation

    searcher = open_version(settings.store, manifest.version)
    out.print(str(write_evaluation(folder, open_store(settings.store), searcher, None, run.stages)))


@app.command()
def reindex(
    config: ConfigFile,
    images: Images = None,
    store: StoreOption = None,
    workers: Workers = None,
    sets: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what changed, from listings; read no image, write nothing.")
    ] = False,
    verify_bytes: Annotated[
        bool, typer.Option("--verify-bytes", help="Also read what seems unchanged, and compare its bytes.")
    ] = False,
    hold: Hold = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write report.html into this folder.")] = None,
    metrics_file: MetricsFileOption = None,
    metrics_port: MetricsPortOption = None,
) -> None:
    """Bring an index up to date at the price of what changed; the first time, build it. For every night.

    Images that are new or have changed are extracted, whatever shards they lie in now; what was deleted is gone from
    the results; ids stay. Codebooks are kept while they suit the new images (`reindex` in the YAML has the limits) and
    trained again, on the stored features, when they do not.

    Example: `cbir reindex configs/cluster.yaml --dry-run`

    Example: `cbir reindex configs/cluster.yaml --set reindex.retrain=always`
    """
    from pipelines.reindex import preview
    from pipelines.reindex import reindex as run_reindex

    settings = _config(config, images, store, workers, sets)
    if dry_run:
        for line in preview(settings):
            out.print(line, soft_wrap=True)
        return
    with watched("reindex", settings, metrics_file, metrics_port) as run:
        done = run_reindex(settings, run, verify_bytes=verify_bytes, hold=hold)
        run.published(done.manifest)
        run.counted(**done.images)
        for name, decision in done.decisions.items():
            run.decided(name, decision.choice, **decision.figures)
    for line in done.lines():
        out.print(line, soft_wrap=True)
    _print_version(settings, done.manifest)
    _write_report(report, settings, done.manifest, run)


@app.command()
def extract(
    config: ConfigFile,
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="Where the files go: a folder or s3:// URI.", show_default=False)
    ],
    npy: Annotated[bool, typer.Option("--npy", help="Write the rows of a channel as one .npy too.")] = False,
    images: Images = None,
    store: StoreOption = None,
    workers: Workers = None,
    sets: Set = None,
) -> None:
    """Extract features and write them as plain files, for an index of your own.

    OUT/CHANNEL/SHARD.parquet has the features of a shard's images by rising id, OUT/CHANNEL/SHARD.quarantine.parquet
    the images that have none, and why. Work is kept in the configuration's store: an interrupted run goes on where it
    stopped, and `cbir index` finds the features there.

    Example: `cbir extract configs/deep_ivfpq.yaml features --images ~/Pictures --npy`
    """
    from pipelines.feature_files import write_features
    from pipelines.indexing import extract as run_extract

    settings = _config(config, images, store, workers, sets)
    with display() as progress:
        extracted = run_extract(settings, progress)
    for channel, counts in write_features(settings, extracted, target, npy=npy).items():
        out.print(
            f"{channel}: {counts['features']:,} features of {counts['indexed']:,} images, "
            f"{counts['quarantined']:,} quarantined, in {target.rstrip('/')}/{channel}/",
            soft_wrap=True,
        )


def _print_quality(quality: Any) -> None:
    for channel, choice in quality.get("index_choice", {}).items():
        out.print(f"{channel}, index chosen: {choice['summary']}")
    for channel, recalls in quality.get("ann_recall", {}).items():
        if not recalls:
            continue
        named = "  ".join(f"recall@{depth} {recall:.3f}" for depth, recall in recalls.items())
        out.print(f"{channel} against exact search: {named}")
    for channel, curve in quality.get("recall_by_effort", {}).items():
        named = "  ".join(f"{effort}: {recall:.3f}" for effort, recall in curve.items())
        out.print(f"{channel}, recall@10 by how much a search looks at: {named}")
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
    searcher = open_searcher(store_of(index), version)
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
        out.print(f"{rank:>4}  {result.score:9.4f}  {printable(result.key)}", soft_wrap=True)


for command in (delete, evaluate, compare, serve, bench_query, runs, *maintenance.COMMANDS):
    app.command()(command)


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
