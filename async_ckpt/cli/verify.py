"""`async-ckpt verify`: read every byte and compare it with what was committed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ..errors import CheckpointNotFoundError, escaped
from ..format.names import check_tag, is_url
from ..observers.units import format_bytes, format_rate, format_seconds
from ..reading.catalog import Catalog
from ..reading.verify import Progress, VerifyReport
from .failing import EXIT_FAILED, NotFoundError, UsageError
from .locating import catalog_of, place_of
from .output import print_json, print_table

_MAX_GONE = 32


def command(
    root: Annotated[
        str,
        typer.Argument(
            help="Directory that holds the checkpoints, or one checkpoint.", metavar="ROOT", show_default=False
        ),
    ],
    tag: Annotated[
        str | None, typer.Argument(help="One checkpoint; all without it.", metavar="[TAG]", show_default=False)
    ] = None,
    level: Annotated[
        str, typer.Option(help="'full' reads everything, 'size' only compares presence and sizes.")
    ] = "full",
    threads: Annotated[int | None, typer.Option(help="Reads in flight; chosen without it.", min=1, max=64)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check all checksums, in parallel; names the damaged files and records. Exit code 1 if anything is damaged.

    Files that somebody else has put into a checkpoint are noted; they damage nothing.

    JSON: a list of {tag, ok, level, num_files, size_bytes, seconds, bytes_per_s, problems: [{path, record, message}],
    extra: [path]}
    """
    if level not in ("full", "size"):
        raise UsageError(f"--level must be 'full' or 'size', not {level!r}")
    catalog, tags = _asked(root, tag)
    results: list[dict[str, Any]] = []
    done: set[str] = set()
    num_gone = 0
    with _bar(as_json) as progress_for:
        for name in tags:
            if name in done:
                continue
            done.add(name)
            started = time.perf_counter()
            try:
                report = catalog.verify(
                    name, level="full" if level == "full" else "size", progress=progress_for(name), num_threads=threads
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
    else:
        _print(results, root)
    if not all(result["ok"] for result in results):
        raise typer.Exit(EXIT_FAILED)


def _asked(root: str, tag: str | None) -> tuple[Catalog, list[str]]:
    if tag is not None:
        return catalog_of(root), [check_tag(tag)]
    try:
        catalog = catalog_of(root)
    except (UsageError, NotFoundError):
        # One checkpoint: a directory, or a single file.
        if not (is_url(root) or os.path.exists(root)):
            raise
        place = place_of(root)
        return place.catalog, [place.tag]
    return catalog, [entry.tag for entry in catalog.entries()]


@contextlib.contextmanager
def _bar(as_json: bool) -> Iterator[Any]:
    """Makes a progress callback per checkpoint; nothing is drawn where standard error is no terminal."""
    import sys

    if as_json or not sys.stderr.isatty():
        yield lambda tag: None
        return
    from ..observers.progress import progress_bar, terminal

    with progress_bar(terminal()) as bar:
        task = bar.add_task("verifying", total=None)

        def progress_for(tag: str) -> Progress:
            # One bar for all of them: each is drawn as often as the screen is.
            bar.reset(task, description=f"verifying {tag}", total=None)
            return lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)

        yield progress_for


def _result(report: VerifyReport, seconds: float) -> dict[str, Any]:
    return {
        "tag": report.tag,
        "ok": report.ok,
        "level": report.level,
        "num_files": report.num_files,
        "size_bytes": report.size_bytes,
        "seconds": seconds,
        "bytes_per_s": report.size_bytes / seconds if report.level == "full" and seconds > 0 else None,
        "extra": list(report.extra),
        "problems": [{"path": p.path, "record": p.record, "message": p.message} for p in report.problems],
    }


def _print(results: list[dict[str, Any]], root: str) -> None:
    if not results:
        typer.echo(f"no checkpoints in {root!r}")
        return
    rows = []
    for result in results:
        rate = "" if result["bytes_per_s"] is None else format_rate(result["bytes_per_s"])
        state = (
            "ok"
            if result["ok"]
            else f"DAMAGED ({len(result['problems'])} problem{'s' * (len(result['problems']) != 1)})"
        )
        rows.append(
            (
                result["tag"],
                str(result["num_files"]),
                format_bytes(result["size_bytes"]),
                format_seconds(result["seconds"]),
                rate,
                state,
            )
        )
    styles = ["" if result["ok"] else "red" for result in results]
    print_table(
        ("tag", "files", "size", "time", "rate", "state"), rows, right=("files", "size", "time", "rate"), styles=styles
    )
    for result in results:
        if result["extra"]:
            names = ", ".join(result["extra"][:5]) + (
                f" and {len(result['extra']) - 5} more" if len(result["extra"]) > 5 else ""
            )
            typer.echo(escaped(f"{result['tag']} also holds, from somebody else: {names}"))
    problems = [(result["tag"], problem) for result in results for problem in result["problems"]]
    if problems:
        typer.echo("")
        print_table(
            ("tag", "file", "record", "problem"),
            [(tag, p["path"], p["record"] or "", p["message"]) for tag, p in problems],
        )
