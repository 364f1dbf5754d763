"""What must hold after every fault: committed checkpoints are whole and right, and life goes on in the same root."""

from __future__ import annotations

from pathlib import Path

from async_ckpt import Catalog
from async_ckpt.reading.load import load_committed
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.making import private_names

from .workloads import Job, Told, Workload, make_engine, version_of

Contents = dict[str, int]


def contents(root: Path, *, skip: tuple[str, ...] = ()) -> Contents:
    """The version of every listed tag, each verified and loaded, all its files (but `skip`); and `latest` agrees."""
    catalog = Catalog(root)
    found: Contents = {}
    for entry in catalog.entries():
        assert entry.manifest is not None, f"{entry.tag!r} is damaged: {entry.problem}"
        report = catalog.verify(entry.tag)
        assert report.ok, report.problems
        versions = {
            version_of(load_committed(catalog, entry.tag, file.path), file.path)
            for file in entry.manifest.files
            if file.path not in skip
        }
        assert len(versions) == 1, f"files of several versions in {entry.tag!r}: {versions}"
        found[entry.tag] = versions.pop()
    tags = catalog.tags()
    assert sorted(tags) == sorted(found)
    assert catalog.latest() == (tags[-1] if tags else None)
    return found


def check_legal(found: Contents, told: Told, keeps: int | None = None) -> None:
    """Everything listed was attempted, and everything reported as committed is there, in that or a later version."""
    for tag, version in found.items():
        assert version in told.attempted.get(tag, []), f"{tag!r} holds version {version}, which nobody saved"
    newest = sorted({version for versions in told.attempted.values() for version in versions}, reverse=True)
    for tag, version in told.committed.items():
        if tag not in found:
            # Retention may have removed what enough newer checkpoints stand for.
            assert keeps is not None and newest.index(version) >= keeps, f"{tag!r} was committed and is lost"
            continue
        assert found[tag] >= version, f"{tag!r} went back from version {version} to {found[tag]}"
    if keeps is not None:
        assert len(found) >= min(keeps, len(told.committed)), found


def check_recovery(root: Path, told: Told, workload: Workload | None = None) -> Contents:
    """The whole oracle: legal now; a new engine sweeps, changes nothing that is committed, and commits."""
    keeps = workload.keeps if workload else None
    found = contents(root)
    check_legal(found, told, keeps)
    with make_engine(root) as engine:
        assert private_names(root) == []
        Job(engine, Told()).whole("after", 1000)
    again = contents(root)
    assert again == {**found, "after": 1000}, (found, again)
    return found


def check_sweep(root: Path, told: Told, keeps: int | None = None) -> Contents:
    """A lighter oracle: legal before and after a sweep."""
    found = contents(root)
    check_legal(found, told, keeps)
    transaction.sweep(FileSystem(), str(root))
    assert private_names(root) == []
    assert contents(root) == found
    return found
