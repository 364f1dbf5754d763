"""`async-ckpt verify`: read every byte and compare it with what was committed."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from typing import Any, Literal

from ..errors import CheckpointNotFoundError, ConfigError, escaped, some_of
from ..format.names import check_tag, is_url
from ..observers.units import format_bytes, format_rate, format_seconds
from ..reading.catalog import Catalog
from ..reading.committed import VerifyReport
from .common import EXIT_FAILED, EXIT_OK, add_json, bar, catalog_of, number, picked, place_of, print_json, print_table

_MAX_GONE = 32


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="directory or URL that holds the checkpoints, or one checkpoint")
    parser.add_argument("tag", metavar="TAG", nargs="?", help="one checkpoint; all without it")
    parser.add_argument(
        "--level",
        choices=("full", "size"),
        default="full",
        help="'full' reads everything, 'size' only compares presence and sizes [full]",
    )
    parser.add_argument("--threads", metavar="N", type=number(int, 1, 64), help="reads in flight; chosen without it")
    add_json(parser)


def command(root: str, tag: str | None, level: Literal["full", "size"], threads: int | None, as_json: bool) -> int:
    """Check all checksums, in parallel; names the damaged files and records. Exit code 1 if anything is damaged.

    Files that somebody else has put into a checkpoint are noted; they damage nothing.

    JSON: a list of {tag, ok, level, num_files, size_bytes, seconds, bytes_per_s, problems: [{path, record, message}],
    extra: [path]}
    """
    catalog, tags = _asked(root, tag)
    results: list[dict[str, Any]] = []
    done: set[str] = set()
    num_gone = 0
    with bar(hidden=as_json) as show:
        for name in tags:
            if name in done:
                continue
            done.add(name)
            started = time.perf_counter()
            try:
                report = catalog.verify(
                    name, level=level, progress=partial(show, f"verifying {name}"), num_threads=threads
                )
            except CheckpointNotFoundError:
                if tag is not None:
                    raise
                # Deleted since it was listed, by retention: that is no damage, and newer ones are there instead.
                if num_gone < _MAX_GONE:
                    tags += [entry.tag for entry in catalog.entries()]
                num_gone += 1
                continue
            results.append(_result(report, time.perf_counter() - started))
    if as_json:
        print_json(results)
    elif not results:
        print(f"no checkpoints in {root!r}")
    else:
        _print(results)
    return EXIT_OK if all(result["ok"] for result in results) else EXIT_FAILED


def _asked(root: str, tag: str | None) -> tuple[Catalog, list[str]]:
    if tag is not None:
        return catalog_of(root), [check_tag(tag)]
    try:
        catalog = catalog_of(root)
    except (ConfigError, CheckpointNotFoundError):
        # One checkpoint: a directory, or a single file.
        if not (is_url(root) or os.path.exists(root)):
            raise
        place = place_of(root)
        return place.catalog, [place.tag]
    return catalog, [entry.tag for entry in catalog.entries()]


def _result(report: VerifyReport, seconds: float) -> dict[str, Any]:
    return {
        **picked(report, "tag ok level num_files size_bytes extra"),
        "seconds": seconds,
        "bytes_per_s": report.size_bytes / seconds if report.level == "full" and seconds > 0 else None,
        "problems": [picked(problem, "path record message") for problem in report.problems],
    }


def _print(results: list[dict[str, Any]]) -> None:
    rows, problems = [], []
    for result in results:
        tag, bad = result["tag"], result["problems"]
        rate = "" if result["bytes_per_s"] is None else format_rate(result["bytes_per_s"])
        state = f"DAMAGED ({len(bad)} problem{'s' * (len(bad) > 1)})" if bad else "ok"
        size, seconds = format_bytes(result["size_bytes"]), format_seconds(result["seconds"])
        rows.append((tag, str(result["num_files"]), size, seconds, rate, state))
        problems += [(tag, problem["path"], problem["record"] or "", problem["message"]) for problem in bad]
    styles = ["" if result["ok"] else "red" for result in results]
    columns = ("tag", "files", "size", "time", "rate", "state")
    print_table(columns, rows, right=("files", "size", "time", "rate"), styles=styles)
    for result in results:
        if result["extra"]:
            print(escaped(f"{result['tag']} also holds, from somebody else: {some_of(result['extra'])}"))
    if problems:
        print()
        print_table(("tag", "file", "record", "problem"), problems)
