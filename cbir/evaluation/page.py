"""Self-contained HTML pages: the templates beside this file, their filters, and pictures as data URIs."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["data_uri", "write_page"]

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def data_uri(content: bytes | None, kind: str = "image/jpeg") -> str | None:
    """The content inside of an address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if content else None


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template; every value is escaped, and a value that the template lacks is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cbir.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": _count,
        "figure": _figure,
        "percent": _percent,
        "size": _size,
        "duration": _duration,
    }
    environment.filters.update(filters)
    # File names need not be UTF-8; such a key shows its odd bytes as backslash escapes.
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8", errors="backslashreplace")


def _count(number: int) -> str:
    """With narrow spaces between the thousands."""
    return f"{number:,}".replace(",", "\u202f")


def _figure(number: float | None, digits: int = 3) -> str:
    return "–" if number is None else f"{number:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u202f%" if share in {0, 1} or share >= 0.01 else "< 1\u202f%"


def _size(num_bytes: float) -> str:
    """In the decimal unit that leaves one to three digits before the point."""
    unit = 0
    while num_bytes >= 999.5 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return (
        f"{num_bytes:.0f}\u202f{_UNITS[unit]}"
        if unit == 0 or num_bytes >= 99.95
        else f"{num_bytes:.1f}\u202f{_UNITS[unit]}"
    )


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes:02}\u202fmin" if hours else f"{minutes}\u202fmin {rest:02}\u202fs"
