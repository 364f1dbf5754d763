"""From what people type (a root, ROOT/TAG, ROOT/TAG/file) to a catalog, a tag and a file."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import CheckpointNotFoundError, ConfigError, escaped
from ..format.names import MANIFEST_NAME, SINGLE_FILES_NAME, is_url, single_file_tag
from ..reading.catalog import Catalog
from ..reading.committed import find_checkpoint
from ..storage.filesystem import read_side_of


@dataclass(frozen=True)
class Located:
    """A checkpoint, or one file of it."""

    catalog: Catalog
    tag: str
    file: str | None

    @property
    def name(self) -> str:
        """What messages call it: the tag, or tag/file."""
        return self.tag if self.file is None else f"{self.tag}/{self.file}"


def catalog_of(root: str) -> Catalog:
    """The catalog of an existing root directory, of a folder of single-file checkpoints, or of a mirror's URL.

    Raises:
        CheckpointNotFoundError: there is no such directory, or nothing in it in a store.
        ConfigError: it is itself a checkpoint.
    """
    if is_url(root):
        catalog = Catalog(root)
        if catalog.filesystem.stat(f"{catalog.root}/{MANIFEST_NAME}").kind != "missing":
            raise ConfigError(f"{escaped(root)!r} is one checkpoint, not a root; leave its tag away")
        if not catalog.filesystem.listdir(catalog.root):
            raise CheckpointNotFoundError(f"nothing is in {escaped(root)!r}")
        return catalog
    if not os.path.isdir(root):
        what = "is not a directory" if os.path.exists(root) else "does not exist"
        raise CheckpointNotFoundError(f"root {escaped(root)!r} {what}")
    if is_checkpoint(root):
        above, tag = os.path.split(os.path.abspath(root))
        raise ConfigError(f"{escaped(root)!r} is one checkpoint, not a root; its root is {above!r}, its tag {tag!r}")
    beside = os.path.join(root, SINGLE_FILES_NAME)
    return Catalog(beside if os.path.isdir(beside) and not Catalog(root).entries() else root)


def place_of(path: str) -> Located:
    """The checkpoint (or file of one) at ROOT/TAG or ROOT/TAG/file, or the one that is one file.

    Raises:
        CheckpointNotFoundError: there is no checkpoint at or above it. ConfigError: it is a root.
    """
    given = path.rstrip("/") if is_url(path) else os.path.abspath(path)
    home, name = os.path.split(given)
    beside, tag = os.path.join(home, SINGLE_FILES_NAME), single_file_tag(name)
    if is_checkpoint(os.path.join(beside, tag)) and os.path.isfile(given):
        return Located(Catalog(beside), tag, None)
    filesystem = read_side_of(given)
    found = find_checkpoint(given, filesystem)
    if found is None:
        raise _no_place(path, given)
    root, tag, inner = found
    return Located(Catalog(root, filesystem), tag, inner or None)


def refuse_single_files(catalog: Catalog) -> None:
    """For commands that delete: a checkpoint that is one file does not lie where its manifest does.

    Raises:
        ConfigError: these checkpoints are single files.
    """
    if os.path.basename(catalog.root) == SINGLE_FILES_NAME:
        raise ConfigError(
            f"the checkpoints in {os.path.dirname(catalog.root)!r} are single files: delete them as files, and the "
            "next run there drops what is kept about them. Nothing was deleted"
        )


def is_checkpoint(folder: str) -> bool:
    """Whether it has a manifest, whole or damaged."""
    return os.path.lexists(os.path.join(folder, MANIFEST_NAME))


def _no_place(path: str, given: str) -> CheckpointNotFoundError | ConfigError:
    name, is_folder = repr(escaped(path)), os.path.isdir(given)
    tags = [entry.tag for entry in Catalog(given).entries()] if is_folder or is_url(given) else []
    if tags:
        return ConfigError(
            f"{name} is a root; name one of its checkpoints, such as {os.path.join(escaped(path), tags[-1])}"
        )
    if is_folder:
        what = f"is not a checkpoint: it has no {MANIFEST_NAME}, and no checkpoint is in it"
    elif is_url(given) or os.path.exists(given):
        what = f"is not in a committed checkpoint: no {MANIFEST_NAME} above it"
    else:
        parent = os.path.dirname(given)
        there = [entry.tag for entry in Catalog(parent).entries()] if os.path.isdir(parent) else []
        what = "does not exist" + (f"; {parent!r} holds {', '.join(there[-5:])}" if there else "")
    return CheckpointNotFoundError(f"{name} {what}")
