"""`async-ckpt list`: what is under a root, committed or not. No typer here, and no rich unless for a terminal (see
`main`)."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import replace
from typing import Any

from ..errors import CheckpointNotFoundError
from ..format.names import is_url
from ..host.process import OwnerState
from ..observers.units import format_age, format_bytes
from ..reading.catalog import Catalog, StagingInfo
from ..reading.committed import CatalogEntry
from .failing import EXIT_FAILED, EXIT_OK
from .locating import catalog_of
from .output import print_json, print_table

_MAX_RACES = 32
Mirrored = dict[tuple[str, int], list[str]]

OWNERS = {
    OwnerState.ALIVE: "live owner",
    OwnerState.DEAD: "dead owner",
    OwnerState.REBOOTED: "owner gone (reboot)",
    OwnerState.FOREIGN: "owner on another host",
    OwnerState.UNKNOWN: "owner unknown",
}


def list_checkpoints(root: str, *, as_json: bool) -> int:
    """Print what is under `root`; returns the exit code."""
    catalog = catalog_of(root)
    now_s = time.time()
    found = _all_committed(catalog, now_s)
    found += [_staged(catalog, info, now_s) for info in catalog.staging()]
    if as_json:
        print_json(found)
    else:
        _print(root, found)
    return EXIT_FAILED if any(item["state"] == "damaged" for item in found) else EXIT_OK


def _all_committed(catalog: Catalog, now_s: float) -> list[dict[str, Any]]:
    mirrors = _mirrors(catalog)
    for _ in range(_MAX_RACES):
        try:
            return catalog.filesystem.each(lambda entry: _committed(catalog, entry, now_s, mirrors), catalog.entries())
        except CheckpointNotFoundError:
            # Deleted since it was listed, by retention: then a newer one is there by now.
            continue
    raise CheckpointNotFoundError(
        f"the checkpoints in {catalog.root!r} come and go faster than they can be listed; try again"
    )


def _mirrors(catalog: Catalog) -> Mirrored:
    """Where checkpoints have been mirrored, where an engine has noted that."""
    if is_url(catalog.root) or not os.path.isdir(os.path.join(catalog.root, ".mirrors")):
        return {}
    from ..mirror.state import mirrored_in
    from ..storage.filesystem import FileSystem

    return mirrored_in(FileSystem(), catalog.root)


def _committed(catalog: Catalog, entry: CatalogEntry, now_s: float, mirrors: Mirrored) -> dict[str, Any]:
    manifest, problem = entry.manifest, entry.problem
    if manifest is None:
        return _item(entry.tag, "damaged", problem=problem)
    report = catalog.verify(entry.tag, level="size")
    if not report.ok:
        problem = str(report.problems[0])
    return _item(
        entry.tag,
        "committed" if problem is None else "damaged",
        problem=problem,
        copied_from=entry.copied_from,
        step=_step(entry),
        metadata=dict(manifest.metadata),
        created_unix_ns=manifest.created_unix_ns,
        age_s=now_s - manifest.created_unix_ns / 1e9,
        size_bytes=sum(file.size_bytes for file in manifest.files),
        num_files=len(manifest.files),
        mirrored=mirrors.get((entry.tag, manifest.created_unix_ns), []),
    )


def _staged(catalog: Catalog, info: StagingInfo, now_s: float) -> dict[str, Any]:
    size_bytes, num_files, changed_s = measure_tree(os.path.join(catalog.root, info.name))
    return _item(
        info.tag,
        info.kind,
        owner=info.owner,
        owner_state=info.owner_state.value,
        name=info.name,
        size_bytes=size_bytes,
        num_files=num_files,
        age_s=None if changed_s is None else now_s - changed_s,
    )


def _item(tag: str, state: str, **fields: Any) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(
        (
            "step",
            "metadata",
            "created_unix_ns",
            "age_s",
            "size_bytes",
            "num_files",
            "problem",
            "copied_from",
            "owner",
            "owner_state",
        )
    )
    empty["mirrored"] = []
    return {"tag": tag, "state": state, **empty, **fields}


def _step(entry: CatalogEntry) -> int | None:
    from ..retention import CheckpointInfo

    return (
        None
        if entry.manifest is None
        else CheckpointInfo.of(replace(entry.manifest, tag=entry.copied_from or entry.tag)).step
    )


def measure_tree(path: str) -> tuple[int | None, int | None, float | None]:
    """Bytes, files and time of the last change of a directory that may vanish meanwhile; None for what cannot be
    seen."""
    size_bytes = num_files = 0
    try:
        changed_s = os.lstat(path).st_mtime
        for folder, _, names in os.walk(path, onerror=_reraise):
            for name in names:
                found = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(found.st_mode):
                    size_bytes, num_files = size_bytes + found.st_size, num_files + 1
                    changed_s = max(changed_s, found.st_mtime)
    except OSError:
        # Committed or deleted in this moment, or another user's: there is nothing to add to its name.
        return None, None, None
    return size_bytes, num_files, changed_s


def _reraise(error: OSError) -> None:
    raise error


def _print(root: str, found: list[dict[str, Any]]) -> None:
    if not found:
        print(f"no checkpoints in {root!r}")
        return
    rows, styles = [], []
    for item in found:
        metadata = {key: value for key, value in (item["metadata"] or {}).items() if key != "step"}
        rows.append(
            (
                item["tag"],
                _or_empty(item["step"], str),
                " ".join(f"{key}={_short(value)}" for key, value in metadata.items()),
                _or_empty(item["age_s"], format_age),
                _or_empty(item["size_bytes"], format_bytes),
                _or_empty(item["num_files"], str),
                _state(item),
            )
        )
        styles.append({"committed": "", "damaged": "red"}.get(item["state"], "dim"))
    print_table(
        ("tag", "step", "metadata", "age", "size", "files", "state"),
        rows,
        right=("step", "age", "size", "files"),
        styles=styles,
    )


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _state(item: dict[str, Any]) -> str:
    if item["state"] == "damaged":
        return f"damaged: {item['problem']}"
    if item["owner_state"] is None:
        mirrored = f", mirrored to {', '.join(item['mirrored'])}" if item["mirrored"] else ""
        return (
            str(item["state"])
            + mirrored
            + (f", copied from {item['copied_from']}" if item["copied_from"] is not None else "")
        )
    return f"{item['state']}, {OWNERS[OwnerState(item['owner_state'])]}"


def _or_empty(value: Any, show: Any) -> str:
    return "" if value is None else show(value)
