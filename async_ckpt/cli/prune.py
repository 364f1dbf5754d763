"""`async-ckpt prune`: delete checkpoints by a retention policy."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..format.names import is_url
from ..observers.units import parse_duration_s
from ..reading.catalog import Catalog
from ..retention import (
    AnyOf,
    CheckpointInfo,
    Decision,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepNewerThan,
    RetentionPolicy,
    apply,
    carry_out,
    committed_here,
    decide,
)
from ..storage.filesystem import FileSystem
from .failing import EXIT_FAILED, NotFoundError, UsageError
from .locating import catalog_of
from .output import print_json, print_table


def command(
    root: Annotated[
        str, typer.Argument(help="Directory or URL that holds the checkpoints.", metavar="ROOT", show_default=False)
    ],
    keep_last: Annotated[int | None, typer.Option(help="Keep the N newest.", show_default=False)] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Keep those whose step is a multiple of N.", show_default=False)
    ] = None,
    keep_best: Annotated[
        str | None, typer.Option(help="Keep the best by this number in the metadata.", show_default=False)
    ] = None,
    best_num: Annotated[int, typer.Option(help="How many --keep-best keeps.")] = 1,
    best_mode: Annotated[
        str, typer.Option(help="Whether the smallest ('min') or the largest ('max') is best.")
    ] = "min",
    keep_newer_than: Annotated[
        str | None, typer.Option(help="Keep those younger than this: 90s, 15min, 6h, 2d, 1w.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted, and why the others are kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete every checkpoint that none of the given policies keeps.

    The newest is always kept, and nothing is deleted while it is damaged. A deletion is a rename first, so that a crash
    leaves nothing half-deleted under a checkpoint's name.

    JSON: a list of {tag, keep, deleted, reasons}; the exit code is 1 when one cannot be deleted
    """
    policy = _policy(keep_last, keep_every, keep_best, best_num, best_mode, keep_newer_than)
    catalog = catalog_of(root)
    checkpoints = [CheckpointInfo.of(manifest) for manifest in committed_here(catalog)]
    if keep_best is not None and checkpoints and not any(keep_best in info.metadata for info in checkpoints):
        known = sorted({name for info in checkpoints for name in info.metadata})
        raise NotFoundError(
            f"no checkpoint has the metric {keep_best!r} in its metadata; they have {', '.join(known) or 'none'}"
        )
    decisions = decide(checkpoints, policy) if dry_run else _carry_out(catalog, policy)
    if as_json:
        print_json([_result(decision, dry_run) for decision in decisions])
    elif not decisions:
        typer.echo(f"no checkpoints in {root!r}")
    else:
        rows = [(d.tag, _action(d, dry_run), "; ".join(d.reasons)) for d in decisions]
        print_table(("tag", "action", "reason"), rows, styles=["" if d.keep else "yellow" for d in decisions])
    if any(decision.failure is not None for decision in decisions):
        raise typer.Exit(EXIT_FAILED)


def _carry_out(catalog: Catalog, policy: RetentionPolicy) -> list[Decision]:
    if not is_url(catalog.root):
        return apply(FileSystem(), catalog.root, policy)
    from ..mirror.config import Mirror
    from ..mirror.open_store import open_store
    from ..mirror.remote_retention import remove_remote

    store = open_store(Mirror(catalog.root), executor=None, filesystem=FileSystem())
    return carry_out(catalog, policy, lambda manifest: remove_remote(store, None, manifest))


def _action(decision: Decision, dry_run: bool) -> str:
    if decision.failure is not None:
        return "not deleted"
    return "kept" if decision.keep else "would be deleted" if dry_run else "deleted"


def _result(decision: Decision, dry_run: bool) -> dict[str, Any]:
    return {
        "tag": decision.tag,
        "keep": decision.keep,
        "deleted": not decision.keep and not dry_run,
        "reasons": list(decision.reasons),
    }


def _policy(
    last: int | None, every: int | None, best: str | None, best_num: int, best_mode: str, newer_than: str | None
) -> RetentionPolicy:
    policies: list[RetentionPolicy] = []
    try:
        if last is not None:
            policies.append(KeepLast(last))
        if every is not None:
            policies.append(KeepEvery(every))
        if best is not None:
            policies.append(KeepBest(best, best_num, "max" if best_mode == "max" else _min(best_mode)))
        if newer_than is not None:
            policies.append(KeepNewerThan(parse_duration_s(newer_than)))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise UsageError(str(error)) from error
    if not policies:
        raise UsageError(
            "say what to keep: --keep-last, --keep-every, --keep-best or --keep-newer-than; nothing was deleted"
        )
    return AnyOf(*policies)


def _min(mode: str) -> Any:
    if mode != "min":
        raise UsageError(f"--best-mode must be 'min' or 'max', not {mode!r}")
    return mode
