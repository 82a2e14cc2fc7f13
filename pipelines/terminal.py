"""What the commands share: how they print, how their errors end, and how they name an index."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from cbir.errors import CbirError, ConfigError
from pipelines.logs import is_json, log_event

if TYPE_CHECKING:
    from cbir.search import Searcher
    from cbir.storage import Store

__all__ = [
    "CONFIG_SUFFIXES",
    "Commands",
    "IndexOrConfig",
    "VersionOption",
    "err",
    "fail",
    "open_searcher",
    "out",
    "printable",
    "store_of",
    "warn",
]

CONFIG_SUFFIXES = (".yaml", ".yml")

# What is printed are keys, paths and messages: nothing in them is markup.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(markup=False, emoji=False, highlight=False, stderr=True)

IndexOrConfig = Annotated[
    str,
    typer.Argument(
        metavar="INDEX", help="A store (folder or s3:// URI), or the YAML that names it.", show_default=False
    ),
]
VersionOption = Annotated[int | None, typer.Option("--version", help="Use this version instead of the current one.")]


class Commands(TyperGroup):
    """The commands; every expected error of one becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            fail(str(error), 2)
        except CbirError as error:
            fail(str(error), 1)
        except OSError as error:
            if error.filename is None:  # none of a file that the user named, such as a closed pipe
                raise
            fail(f"{error.filename}: {error.strerror}", 1)
        except KeyboardInterrupt:
            fail("interrupted; run the same command again to go on", 130)


def fail(message: str, code: int) -> NoReturn:
    """Say why on the error stream, and end with this exit code."""
    if is_json():
        log_event(message, {"exit_code": code}, logging.ERROR)
    else:
        err.print("error: " + "\n".join(map(printable, message.split("\n"))), soft_wrap=True)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Say on the error stream what the user should know."""
    if is_json():
        log_event(message, level=logging.WARNING)
    else:
        err.print(f"warning: {printable(message)}", soft_wrap=True)


def printable(text: str) -> str:
    """The text with control characters written as `\\x1b`: no key is to colour a terminal or to move its cursor."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def store_of(index: str) -> "Store":
    """The store that a YAML names, or that the argument is."""
    from cbir.storage import open_store

    if index.endswith(CONFIG_SUFFIXES):
        from cbir.config import load_config

        return open_store(load_config(index).store)
    if "://" not in index and not Path(index).is_dir():
        raise ConfigError(f"{index} is neither a folder with an index nor a YAML file")
    return open_store(index)


def open_searcher(store: "Store", version: int | None) -> "Searcher":
    """A version of a store in this process, the current one by default, that searches with one thread."""
    from cbir.search import open_version
    from pipelines.work import limit_threads

    limit_threads()
    return open_version(store.uri, version)
