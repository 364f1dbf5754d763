"""`async-ckpt mirror`: copy committed checkpoints to an object store or another disk, by hand."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from ..errors import MirrorError, escaped
from ..format.names import check_tag
from ..metrics import MirrorMetrics
from ..mirror.config import Mirror
from ..mirror.mirrors import Mirrors
from ..observers.units import format_bytes, format_rate
from ..reading.catalog import Catalog
from ..storage.filesystem import FileSystem
from .failing import EXIT_FAILED
from .locating import catalog_of
from .output import print_json

_POLL_S = 0.25


def command(
    root: Annotated[
        str, typer.Argument(help="Directory that holds the checkpoints.", metavar="ROOT", show_default=False)
    ],
    url: Annotated[
        str, typer.Argument(help="s3://bucket/run, gs://, az:// or file:///path.", metavar="URL", show_default=False)
    ],
    tag: Annotated[
        str | None, typer.Argument(help="One checkpoint; all without it.", metavar="[TAG]", show_default=False)
    ] = None,
    parallel: Annotated[int, typer.Option(help="Parts on their way at once.", min=1, max=256)] = 4,
    part_mib: Annotated[int, typer.Option(help="Size of one part, in MiB.", min=5, max=1024)] = 16,
    max_mib_per_s: Annotated[
        float | None, typer.Option(help="Bound of the rate, in MiB per second.", show_default=False)
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace older checkpoints of the same tags.")] = False,
    only_writer: Annotated[
        bool, typer.Option("--only-writer", help="Nobody else writes there: also use a store that ignores conditions.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload what is not mirrored yet; go on where an earlier upload was cut short. Exit code 1 if one could not be
    mirrored.

    Credentials and endpoint are those of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).

    JSON: a list of {tag, error, size_bytes, sent_bytes, bytes_per_s}
    """
    catalog = catalog_of(root)
    tags = [check_tag(tag)] if tag is not None else catalog.tags()
    for name in tags:
        catalog.path(name)
    max_bytes_per_s = None if max_mib_per_s is None else max_mib_per_s * (1 << 20)
    mirror = Mirror(
        url, parallel=parallel, part_bytes=part_mib << 20, max_bytes_per_s=max_bytes_per_s, on_failure="raise"
    )
    results = _upload(catalog, mirror, tags, replace, only_writer, as_json)
    if as_json:
        print_json(results)
    if any(result["error"] is not None for result in results):
        raise typer.Exit(EXIT_FAILED)


def _upload(
    catalog: Catalog, mirror: Mirror, tags: list[str], may_overwrite: bool, only_writer: bool, as_json: bool
) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    made = Mirrors(
        (mirror,), filesystem=FileSystem(), root=catalog.root, may_overwrite=may_overwrite, with_backlog=False
    )
    try:
        made.check()
        if made.unconditional and not only_writer:
            raise MirrorError(
                "the store ignores conditions, so that two writers could overwrite each other's manifests: nothing was "
                "sent. Give --only-writer where nobody else writes there",
                url=mirror.url,
            )
        pendings = [made.expect(tag) for tag in tags]
        for pending in pendings:
            made.committed(pending, None)
        with _progress(as_json) as show:
            for pending in pendings:
                while not pending.wait(_POLL_S):
                    show(pending.metrics)
                error, metrics = pending.exception(0), pending.metrics
                results.append(_result(metrics, error))
                if not as_json:
                    typer.echo(_line(metrics, error))
    finally:
        made.close(0.0)
    return results


def _result(metrics: MirrorMetrics, error: BaseException | None) -> dict[str, object]:
    return {
        "tag": metrics.tag,
        "error": None if error is None else str(error),
        "size_bytes": metrics.size_bytes,
        "sent_bytes": metrics.sent_bytes,
        "bytes_per_s": metrics.bytes_per_s,
    }


def _line(metrics: MirrorMetrics, error: BaseException | None) -> str:
    if error is not None:
        return escaped(f"{metrics.tag}: NOT MIRRORED: {error}")
    if not metrics.sent_bytes:
        return f"{metrics.tag}: mirrored already"
    return f"{metrics.tag}: mirrored, {format_bytes(metrics.sent_bytes)} sent, {format_rate(metrics.bytes_per_s)}"


@contextlib.contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[MirrorMetrics], None]]:
    """What draws a bar on a terminal; elsewhere nothing."""
    if as_json or not sys.stderr.isatty():
        yield lambda metrics: None
        return
    from ..observers.progress import progress_bar, terminal

    with progress_bar(terminal()) as bar:
        task = bar.add_task("mirroring", total=None)
        yield lambda metrics: bar.update(
            task, description=f"mirroring {metrics.tag}", completed=metrics.sent_bytes, total=metrics.size_bytes or None
        )
