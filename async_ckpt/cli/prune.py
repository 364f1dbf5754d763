"""`async-ckpt prune`: delete checkpoints by a retention policy."""

from __future__ import annotations

import argparse
from typing import Literal

from ..errors import CheckpointNotFoundError, ConfigError
from ..format.names import is_url
from ..observers.units import parse_duration_s
from ..reading.catalog import Catalog
from ..retention import (
    AnyOf,
    CheckpointInfo,
    Decision,
    Hold,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepNewerThan,
    RetentionPolicy,
    apply,
    carry_out,
    decide,
)
from ..storage.filesystem import FileSystem
from .common import (
    EXIT_FAILED,
    EXIT_OK,
    add_json,
    add_root,
    catalog_of,
    picked,
    print_json,
    print_table,
    refuse_single_files,
)
from .list import mirrors_of


def options(parser: argparse.ArgumentParser) -> None:
    add_root(parser, "directory or URL")
    parser.add_argument("--keep-last", metavar="N", type=int, help="keep the N newest")
    parser.add_argument("--keep-every", metavar="N", type=int, help="keep those whose step is a multiple of N")
    parser.add_argument("--keep-best", metavar="NAME", help="keep the best by this number in the metadata")
    parser.add_argument("--best-num", metavar="N", type=int, help="how many --keep-best keeps [1]")
    parser.add_argument("--best-mode", choices=("min", "max"), help="whether the smallest or the largest is best [min]")
    parser.add_argument("--keep-newer-than", metavar="AGE", help="keep those younger than this: 90s, 15min, 6h, 2d, 1w")
    parser.add_argument("--ignore-mirrors", action="store_true", help="also delete what is not mirrored yet")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be deleted, and why the others are kept"
    )
    add_json(parser)


def command(
    root: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: str | None,
    best_num: int | None,
    best_mode: Literal["min", "max"] | None,
    keep_newer_than: str | None,
    ignore_mirrors: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Delete every checkpoint that none of the given policies keeps.

    The newest is always kept, and so is what a mirror of an engine on this root has not had yet (unless
    --ignore-mirrors); nothing is deleted while the newest is damaged. A deletion is a rename first, so that a crash
    leaves nothing half-deleted under a checkpoint's name.

    JSON: a list of {tag, keep, deleted, reasons}; the exit code is 1 when one cannot be deleted
    """
    policies: list[RetentionPolicy] = []
    if keep_last is not None:
        policies.append(KeepLast(keep_last))
    if keep_every is not None:
        policies.append(KeepEvery(keep_every))
    if keep_best is not None:
        policies.append(KeepBest(keep_best, 1 if best_num is None else best_num, best_mode or "min"))
    elif best_num is not None or best_mode is not None:
        raise ConfigError("--best-num and --best-mode go with --keep-best; nothing was deleted")
    if keep_newer_than is not None:
        policies.append(KeepNewerThan(parse_duration_s(keep_newer_than)))
    if not policies:
        raise ConfigError(
            "say what to keep: --keep-last, --keep-every, --keep-best or --keep-newer-than; nothing was deleted"
        )
    catalog = catalog_of(root)
    refuse_single_files(catalog)
    checkpoints = [CheckpointInfo.of(manifest) for manifest in catalog.committed()]
    if keep_best is not None and checkpoints and all(info.metadata.get(keep_best) is None for info in checkpoints):
        known = sorted({name for info in checkpoints for name in info.metadata})
        raise CheckpointNotFoundError(
            f"no checkpoint has a number {keep_best!r} in its metadata; they have {', '.join(known) or 'none'}"
        )
    policy = AnyOf(*policies)
    mirrors = [] if ignore_mirrors else [mirror for mirror in mirrors_of(catalog) if mirror.takes_all]

    def hold(info: CheckpointInfo) -> str | None:
        lacking = [each.url for each in mirrors if (info.tag, info.created_unix_ns) not in each.checkpoints]
        return f"not mirrored yet to {', '.join(lacking)} (--ignore-mirrors deletes it)" if lacking else None

    decisions = decide(checkpoints, policy, hold=hold) if dry_run else _carry_out(catalog, policy, hold)
    if as_json:
        print_json([{**picked(d, "tag keep reasons"), "deleted": not d.keep and not dry_run} for d in decisions])
    elif not decisions:
        print(f"no checkpoints in {root!r}")
    else:
        rows = [(d.tag, _action(d, dry_run), "; ".join(d.reasons)) for d in decisions]
        print_table(("tag", "action", "reason"), rows, styles=["" if d.keep else "yellow" for d in decisions])
    return EXIT_FAILED if any(decision.failure is not None for decision in decisions) else EXIT_OK


def _carry_out(catalog: Catalog, policy: RetentionPolicy, hold: Hold) -> list[Decision]:
    if not is_url(catalog.root):
        return apply(FileSystem(), catalog.root, policy, hold)
    from ..mirror.config import Mirror
    from ..mirror.objects import remove_remote
    from ..mirror.remote import open_store

    store = open_store(Mirror(catalog.root), FileSystem())
    return carry_out(catalog, policy, lambda manifest: remove_remote(store, None, manifest))


def _action(decision: Decision, dry_run: bool) -> str:
    if decision.failure is not None:
        return "not deleted"
    return "kept" if decision.keep else "would be deleted" if dry_run else "deleted"
