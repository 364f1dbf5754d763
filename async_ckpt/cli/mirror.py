"""`async-ckpt mirror`: copy committed checkpoints to an object store or another disk, by hand."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import CheckpointNotFoundError, ConfigError, MirrorError, escaped
from ..format.names import is_url
from ..metrics import MirrorMetrics
from ..mirror.config import Mirror
from ..mirror.mirrors import Mirrors
from ..observers.units import format_bytes, format_rate
from ..reading.catalog import Catalog
from ..storage.filesystem import FileSystem
from .common import EXIT_FAILED, EXIT_OK, add_json, add_root, bar, catalog_of, number, picked, print_json

_POLL_S = 0.25


def options(parser: argparse.ArgumentParser) -> None:
    add_root(parser)
    parser.add_argument("url", metavar="URL", help="s3://bucket/run, gs://, az:// or file:///path")
    parser.add_argument("tag", metavar="TAG", nargs="?", help="one checkpoint; all without it")
    parser.add_argument(
        "--parallel", metavar="N", type=number(int, 1, 256), default=4, help="parts on their way at once [4]"
    )
    parser.add_argument(
        "--part-mib", metavar="MIB", type=number(int, 5, 1024), default=16, help="size of one part, in MiB [16]"
    )
    parser.add_argument("--max-mib-per-s", metavar="MIB", type=float, help="bound of the rate, in MiB per second")
    parser.add_argument("--replace", action="store_true", help="replace older checkpoints of the same tags")
    parser.add_argument(
        "--only-writer",
        action="store_true",
        help="nobody else writes there: also use a store that ignores conditions",
    )
    add_json(parser)


def command(
    root: str,
    url: str,
    tag: str | None,
    parallel: int,
    part_mib: int,
    max_mib_per_s: float | None,
    replace: bool,
    only_writer: bool,
    as_json: bool,
) -> int:
    """Upload what is not mirrored yet; go on where an earlier upload was cut short. Exit code 1 if one could not be
    mirrored.

    Credentials and endpoint are those of the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).

    JSON: a list of {tag, error, size_bytes, sent_bytes, bytes_per_s}
    """
    if is_url(root):
        raise ConfigError(f"{escaped(root)!r} is a store: what is mirrored lies in a local directory")
    catalog = catalog_of(root)
    tags = [manifest.tag for manifest in catalog.committed()]
    if tag is not None and tag not in tags:
        source = next((entry.copied_from for entry in catalog.entries() if entry.tag == tag), None)
        if source is None:
            raise CheckpointNotFoundError(f"no checkpoint {escaped(tag)!r} in {escaped(root)!r}")
        raise ConfigError(f"{escaped(tag)!r} is a copy of {source!r} or a link to it: mirror that one")
    tags = [tag] if tag is not None else tags
    max_bytes_per_s = None if max_mib_per_s is None else max_mib_per_s * (1 << 20)
    mirror = Mirror(
        url, parallel=parallel, part_bytes=part_mib << 20, max_bytes_per_s=max_bytes_per_s, on_failure="raise"
    )
    results = _upload(catalog, mirror, tags, replace, only_writer, as_json)
    if as_json:
        print_json(results)
    return EXIT_FAILED if any(result["error"] is not None for result in results) else EXIT_OK


def _upload(
    catalog: Catalog, mirror: Mirror, tags: list[str], may_overwrite: bool, only_writer: bool, as_json: bool
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
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
        with bar(hidden=as_json) as show:
            for pending in pendings:
                while not pending.wait(_POLL_S):
                    metrics = pending.metrics
                    show(f"mirroring {metrics.tag}", metrics.sent_bytes, metrics.size_bytes or None)
                error, metrics = pending.exception(0), pending.metrics
                said = None if error is None else str(error)
                results.append({"error": said, **picked(metrics, "tag size_bytes sent_bytes bytes_per_s")})
                if not as_json:
                    print(_line(metrics, error))
    finally:
        made.close(0.0)
    return results


def _line(metrics: MirrorMetrics, error: BaseException | None) -> str:
    if error is not None:
        return escaped(f"{metrics.tag}: NOT MIRRORED: {error}")
    if not metrics.sent_bytes:
        return f"{metrics.tag}: mirrored already"
    return f"{metrics.tag}: mirrored, {format_bytes(metrics.sent_bytes)} sent, {format_rate(metrics.bytes_per_s)}"
