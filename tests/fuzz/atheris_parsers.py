"""Fuzz one parser with atheris, which follows the branches that its Python code takes.

python -m tests.fuzz.atheris_parsers tar -max_total_time=60      any option of libFuzzer; needs `pip install atheris`

A finding is written as crash-*, timeout-* or oom-* into the working directory, and ends the process with an error.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cbir", "tarfile", "yaml", "csv", "json"]):
    from cbir.errors import CbirError
    from tests.fuzz.parsers import PARSERS, SEEDS

LIMITS = ("-timeout=20", "-rss_limit_mb=4096", "-max_len=65536")


def main() -> None:
    """Fuzz the parser that the command line names, from its seeds."""
    program, name, *options = sys.argv

    def parse(data: bytes) -> None:
        with contextlib.suppress(CbirError):
            PARSERS[name](data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[name]):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([program, *LIMITS, *options, corpus], parse)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
