"""`async-ckpt list`: what is under a root, committed or not. No rich unless for a terminal: scripts call it often."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointNotFoundError
from ..format.metadata import with_not_finite
from ..format.names import is_url
from ..host.process import OwnerState
from ..observers.units import format_age, format_bytes
from ..reading.catalog import Catalog, CatalogEntry, StagingInfo
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import tree_of
from .common import EXIT_FAILED, EXIT_OK, add_json, add_root, catalog_of, print_json, print_table

if TYPE_CHECKING:
    from ..mirror.state import Mirrored

_MAX_RACES = 32

OWNERS = {
    OwnerState.ALIVE: "live owner",
    OwnerState.DEAD: "dead owner",
    OwnerState.REBOOTED: "owner gone (reboot)",
    OwnerState.FOREIGN: "owner on another host",
    OwnerState.UNKNOWN: "owner unknown",
}


def options(parser: argparse.ArgumentParser) -> None:
    add_root(parser, "directory or URL")
    add_json(parser)


def command(root: str, as_json: bool) -> int:
    """List checkpoints with step, metadata, age, size and state; oldest first.

    Manifests, presence and sizes of files are checked; `verify` also reads the contents. Exit code 1 if one is damaged.

    Of a checkpoint that shares bytes with the one before it, both are shown: what was written is what it cost.

    JSON: a list of {tag, state, step, metadata, created_unix_ns, age_s, size_bytes, written_bytes, shared_bytes,
    num_files, problem, copied_from, owner, owner_state, mirrored: [url]} and, for what is not committed, name; where
    metadata holds NaN or infinities, which are null there, not_finite says what they are; state is committed, damaged,
    staging, trash or aside.
    """
    catalog = catalog_of(root)
    now_s = time.time()
    found = _all_committed(catalog, now_s) + [
        _item(**staged(catalog, info, now_s), state=info.kind) for info in catalog.staging()
    ]
    if as_json:
        print_json(found)
    elif not found:
        print(f"no checkpoints in {root!r}")
    else:
        print_table(
            ("tag", "step", "metadata", "age", "size", "files", "state"),
            [_row(item) for item in found],
            right=("step", "age", "size", "files"),
            styles=[{"committed": "", "damaged": "red"}.get(item["state"], "dim") for item in found],
        )
    return EXIT_FAILED if any(item["state"] == "damaged" for item in found) else EXIT_OK


def _all_committed(catalog: Catalog, now_s: float) -> list[dict[str, Any]]:
    mirrors = mirrors_of(catalog)
    for _ in range(_MAX_RACES):
        try:
            return catalog.filesystem.each(lambda entry: _committed(catalog, entry, now_s, mirrors), catalog.entries())
        except CheckpointNotFoundError:
            # Deleted since it was listed, by retention: then a newer one is there by now.
            continue
    raise CheckpointNotFoundError(
        f"the checkpoints in {catalog.root!r} come and go faster than they can be listed; try again"
    )


def mirrors_of(catalog: Catalog) -> list[Mirrored]:
    """What the mirrors of a root have had."""
    if is_url(catalog.root) or not os.path.isdir(os.path.join(catalog.root, ".mirrors")):
        return []
    from ..mirror.state import mirrored_in

    return mirrored_in(FileSystem(), catalog.root)


def _committed(catalog: Catalog, entry: CatalogEntry, now_s: float, mirrors: list[Mirrored]) -> dict[str, Any]:
    from ..retention import CheckpointInfo

    manifest, problem = entry.manifest, entry.problem
    if manifest is None:
        return _item(tag=entry.tag, state="damaged", problem=problem)
    report = catalog.verify(entry.tag, level="size")
    if not report.ok:
        problem = str(report.problems[0])
    not_finite = {"not_finite": dict(manifest.not_finite)} if manifest.not_finite else {}
    return _item(
        **not_finite,
        tag=entry.tag,
        state="committed" if problem is None else "damaged",
        problem=problem,
        copied_from=entry.copied_from,
        step=CheckpointInfo.of(replace(manifest, tag=entry.copied_from or entry.tag)).step,
        metadata=dict(manifest.metadata),
        created_unix_ns=manifest.created_unix_ns,
        age_s=now_s - manifest.created_unix_ns / 1e9,
        size_bytes=manifest.size_bytes,
        written_bytes=manifest.size_bytes - manifest.shared_bytes,
        shared_bytes=manifest.shared_bytes,
        num_files=len(manifest.files),
        mirrored=[mirror.url for mirror in mirrors if (entry.tag, manifest.created_unix_ns) in mirror.checkpoints],
    )


def _item(**known: Any) -> dict[str, Any]:
    names = "tag state step metadata created_unix_ns age_s size_bytes written_bytes shared_bytes num_files problem"
    return {**dict.fromkeys([*names.split(), "copied_from", "owner", "owner_state"]), "mirrored": [], **known}


def staged(catalog: Catalog, info: StagingInfo, now_s: float) -> dict[str, Any]:
    """What can be said of one staging directory, which may vanish meanwhile: tag, name, owner, and the age and size
    where they can be seen."""
    filesystem, path = FileSystem(), os.path.join(catalog.root, info.name)
    seen = dict.fromkeys(("age_s", "size_bytes", "num_files"))
    top = filesystem.stat(path)
    # Committed or deleted in this moment, or another user's: then there is nothing to add to its name.
    with contextlib.suppress(OSError):
        files = [found for _, found in tree_of(filesystem, path) if found.kind == "file"]
        age_s = now_s - max(found.mtime_ns for found in (top, *files)) / 1e9
        seen = {"age_s": age_s, "size_bytes": sum(found.size_bytes for found in files), "num_files": len(files)}
    return {"tag": info.tag, "name": info.name, "owner": info.owner, "owner_state": info.owner_state.value, **seen}


def _row(item: dict[str, Any]) -> tuple[str, ...]:
    def shown(name: str, show: Callable[[Any], str]) -> str:
        return "" if item[name] is None else show(item[name])

    metadata = with_not_finite(item["metadata"] or {}, item.get("not_finite", {}))
    metadata = {key: value for key, value in metadata.items() if key != "step"}
    size = shown("size_bytes", format_bytes)
    if item["shared_bytes"]:
        size += f" ({format_bytes(item['written_bytes'])} written, {format_bytes(item['shared_bytes'])} shared)"
    return (
        item["tag"],
        shown("step", str),
        " ".join(f"{key}={_short(value)}" for key, value in metadata.items()),
        shown("age_s", format_age),
        size,
        shown("num_files", str),
        _state(item),
    )


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _state(item: dict[str, Any]) -> str:
    state = str(item["state"])
    if state == "damaged":
        return f"damaged: {item['problem']}"
    if item["owner_state"] is not None:
        return f"{state}, {OWNERS[OwnerState(item['owner_state'])]}"
    if item["mirrored"]:
        state += f", mirrored to {', '.join(item['mirrored'])}"
    return state if item["copied_from"] is None else f"{state}, copied from {item['copied_from']}"
