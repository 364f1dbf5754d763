"""What an engine finds and reads back: not before the commits that this process has pending are over."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..errors import BackpressureTimeout, ConfigError, report
from ..reading.catalog import Catalog
from .commits import Commits
from .interface import StrPath
from .pending import PendingCommit


def latest(commits: Commits, verify: str, tier: str) -> str | None:
    """`AsyncCheckpointEngine.latest`."""
    if tier not in ("disk", "any"):
        raise ConfigError(f"tier must be 'disk' or 'any', not {tier!r}")
    others = commits.others()
    _await(commits, (pending for other in others for pending in other.unfinished()))
    for pending in [pending for other in others for pending in other.unacknowledged()]:
        told = "checkpoint %r of another engine of this process on %r was not committed: %s"
        report(logging.WARNING, told, pending.tag, commits.root, pending.failure())
    if tier == "disk" or commits.mirrors is None:
        return commits.catalog.latest(verify)
    return commits.mirrors.latest(commits.catalog, verify)


def find_file(commits: Commits, path: StrPath) -> tuple[Catalog, str, str]:
    """Where the committed file `path` is, on disk or in a mirror: its catalog, tag and path inside that."""
    tag, name = commits.paths.split_committed(path)
    return find_catalog(commits, tag), tag, name


def find_catalog(commits: Commits, tag: str) -> Catalog:
    """`AsyncCheckpointEngine.catalog_of`."""
    await_commits(commits, tag)
    return commits.catalog if commits.mirrors is None else commits.mirrors.resume_from(tag, commits.catalog)


def await_commits(commits: Commits, tag: str) -> None:
    """Wait for pending commits of this tag in this process, if there are any."""
    commits.check_usable()
    engines = (commits, *commits.others())
    _await(commits, (found for each in engines if (found := each.find_unfinished(tag)) is not None))


def _await(commits: Commits, pending: Iterable[PendingCommit]) -> None:
    timeout_s = commits.backpressure_timeout_s
    for one in list(pending):
        if not one.wait(timeout_s):
            raise BackpressureTimeout(f"the commit of {one.tag!r} did not end within {timeout_s:g} s; it goes on")
