"""Every on-disk name: what a tag, a file in a checkpoint and a private directory may be called. Pure functions.

The rules are strict so that a name means the same to every file system, shell and reader: ASCII letters, digits and
a few signs, no leading dot, bounded length. Names are looked up, never joined from unchecked text.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Literal, cast

from ..errors import UnsafePathError
from ..host.process import Owner

MANIFEST_NAME = "manifest.json"
DCP_METADATA_NAME = ".metadata"
"""The only file that may begin with a dot: torch.distributed.checkpoint looks for it under this name."""
SINGLE_FILES_NAME = ".async_ckpt"
"""The root, beside checkpoints that are one file each, of their manifests; those name the file in their metadata."""
MAX_TAG_BYTES = 128
_MAX_NAME_BYTES = 255
MAX_COMPONENT_BYTES = 200
MAX_PATH_BYTES = 1024
_MAX_PARTS = 64

_PART_PREFIX = ".part."
"""A rank's own list of files, in the staging directory."""

NameKind = Literal["staging", "trash", "aside"]
StrPath = str | os.PathLike[str]

_COMPONENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._+=@, -]*[A-Za-z0-9._+=@-])?")
_PRIVATE = re.compile(
    rf"\.(?P<kind>staging|trash|aside)\.(?P<tag>{_COMPONENT.pattern})\.(?P<owner>[^.]+)\.(?P<number>[0-9]{{1,12}})"
)


@dataclass(frozen=True)
class PrivateName:
    """A staging, trash or aside directory's name, and what it is made of."""

    name: str
    kind: NameKind
    tag: str
    owner: Owner
    number: int


def check_tag(tag: str) -> str:
    """`tag` itself, when it can name a checkpoint directory. Raises UnsafePathError: not a str, empty, too long, a
    separator or leading dot, or a character outside letters, digits and `_ . + = @ - ,` and inner spaces (ASCII only);
    or the manifest's own name."""
    _check_component(tag, "tag", MAX_TAG_BYTES)
    if tag.casefold() == MANIFEST_NAME:
        raise UnsafePathError(f"tag {shown(tag)}: {MANIFEST_NAME!r} is the checkpoint's own file; choose another tag")
    return tag


def check_existing_tag(name: str) -> str:
    """`name` itself, when a checkpoint may have got it by being copied or renamed: one directory's printable name,
    without a leading dot. Raises UnsafePathError: it is no such name."""
    is_name = isinstance(name, str) and name.isprintable() and "/" not in name and not name.startswith(".")
    return name if is_name and 0 < len(name.encode()) <= _MAX_NAME_BYTES else check_tag(name)


def check_relative_path(path: str, *, carried: bool = False, stored: bool = False) -> tuple[str, ...]:
    """The components of `path`, when it can name a file or directory inside a checkpoint. Raises UnsafePathError: as
    `check_tag` for each component; also absolute paths, "..", and the manifest's own name.

    What another tool chose and is `carried` (``.gitattributes``, ``notes (1).txt``) may have any printable characters,
    and a leading dot; what is `stored` already, the manifest's name below the top too, which earlier versions took.
    """
    _check_text(path, "path")
    if len(path) > MAX_PATH_BYTES:
        raise UnsafePathError(f"path {shown(path)} is longer than {MAX_PATH_BYTES} bytes; nothing was touched")
    parts = tuple(path.split("/"))
    if len(parts) > _MAX_PARTS:
        raise UnsafePathError(f"path {shown(path)} has more than {_MAX_PARTS} components; nothing was touched")
    for part in parts:
        if carried or stored:
            _check_foreign(part, path)
        elif path != DCP_METADATA_NAME:
            _check_component(part, "path", MAX_COMPONENT_BYTES, whole=path)
    if MANIFEST_NAME in [part.casefold() for part in (parts[:1] if stored else parts)]:
        raise UnsafePathError(f"path {shown(path)}: {MANIFEST_NAME!r} is the checkpoint's own; choose another name")
    return parts


def single_file_tag(name: str) -> str:
    """The tag below `SINGLE_FILES_NAME` of a checkpoint that is one file called `name`: that, or a digest where it can
    be no tag."""
    try:
        return check_tag(name)
    except UnsafePathError:
        return "file-" + hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()


def private_name(kind: NameKind, tag: str, owner: Owner, number: int) -> str:
    """The name of a staging, trash or aside directory."""
    return f".{kind}.{tag}.{owner}.{number}"


def parse_private_name(name: str) -> PrivateName | None:
    """The parts of a staging, trash or aside name exactly as this package writes them; None for every other name."""
    found = _PRIVATE.fullmatch(name)
    owner = Owner.parse(found["owner"]) if found else None
    if found is None or owner is None or len(found["tag"]) > MAX_TAG_BYTES:
        return None
    parts = cast(NameKind, found["kind"]), found["tag"], owner, int(found["number"])
    return PrivateName(name, *parts) if private_name(*parts) == name else None


def is_url(path: object) -> bool:
    """Whether `path` names a store ("s3://bucket/run") rather than a local path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


class Root:
    """A directory of checkpoints. A relative one is resolved once, here: a later `os.chdir` does not move it."""

    def __init__(self, root: StrPath) -> None:
        given = os.fspath(root)
        if is_url(given):
            self.path = given.rstrip("/")
            self._prefixes = [self.path]
            return
        self.path = os.path.abspath(given)
        """Absolute; links in it are kept. Of a store: its URL."""
        # However the user writes it. (The root "/" leaves nothing to compare with: its paths are relative ones.)
        spellings = (spelt.rstrip("/") for spelt in (given, self.path, os.path.realpath(given)))
        self._prefixes = [prefix for prefix in spellings if prefix]

    def is_named_by(self, path: StrPath) -> bool:
        """Whether `path` is the root itself."""
        return os.fspath(path).rstrip("/") in self._prefixes or os.path.abspath(os.fspath(path)) == self.path

    def split(self, path: StrPath, *, carried: bool = False) -> tuple[str | None, tuple[str, ...]]:
        """The tag that `path` names, and the checked components inside it; the tag is None for a path relative to a
        tag.

        "<root>/<tag>/a/b.pt" gives (tag, ("a", "b.pt")), whether the root is written as it was given or absolute.
        No component is ever resolved: ".." and links are refused, not followed. Raises UnsafePathError: malformed, or
        absolute and outside the root.
        """
        is_below, inner = self._below(path)
        if not is_below:
            return None, check_relative_path(inner, carried=carried)
        tag, _, rest = inner.partition("/")
        return check_tag(tag), check_relative_path(rest, carried=carried) if rest else ()

    def split_committed(self, path: StrPath, *, tag: str | None = None) -> tuple[str, str]:
        """The tag and the file of "<tag>/file.pt" or "<root>/<tag>/file.pt"; with `tag` also of "file.pt", in that
        checkpoint. Raises UnsafePathError: malformed, outside the root, in another checkpoint than `tag`, or no file
        inside one."""
        is_below, inner = self._below(path)
        if tag is None or is_below:
            found, _, inner = inner.partition("/")
            check_existing_tag(found)
            if tag not in (None, found) or not inner:
                what = "a checkpoint; give '<tag>/<file>'" if tag is None else f"the checkpoint {shown(tag)}"
                raise UnsafePathError(f"path {shown(os.fspath(path))} names no file inside {what}; nothing was touched")
            tag = found
        return tag, "/".join(check_relative_path(inner, stored=True))

    def _below(self, path: StrPath) -> tuple[bool, str]:
        """Whether the path begins with the root, and what it says behind that."""
        text = os.fspath(path)
        _check_text(text, "path")
        for prefix in self._prefixes:
            if text.startswith(prefix + "/"):
                return True, text[len(prefix) + 1 :]
        if text.startswith("/"):
            raise UnsafePathError(
                f"path {shown(text)} is absolute and not below the root {shown(self.path)}; nothing was touched"
            )
        return False, text


def _check_text(given: object, what: str) -> None:
    if not isinstance(given, str):
        raise UnsafePathError(f"a {what} must be a str, not {type(given).__name__}; nothing was touched")


def _check_component(part: str, what: str, max_bytes: int, whole: str | None = None) -> None:
    _check_text(part, what)
    for is_bad, why in (
        (not part, "has an empty component" if whole else "is empty"),
        (len(part) > max_bytes, f"is longer than {max_bytes} bytes"),
        (part.startswith("."), "starts a name with a dot"),
        (
            not _COMPONENT.fullmatch(part),
            "holds a character that is not allowed: use ASCII letters, digits, _ . + = @ - , and spaces inside",
        ),
    ):
        if is_bad:
            raise UnsafePathError(f"{what} {shown(part if whole is None else whole)} {why}; nothing was touched")


def _check_foreign(part: str, whole: str) -> None:
    """What a name must be even where another tool chose it: one component, printable, none of this package's own."""
    too_long = len(part.encode("utf-8", "surrogatepass")) > MAX_COMPONENT_BYTES
    for is_bad, why in (
        (part in ("", ".", ".."), "is empty or only dots"),
        (too_long or not part.isprintable(), f"cannot be printed, or is longer than {MAX_COMPONENT_BYTES} bytes"),
        (part.startswith(_PART_PREFIX) or parse_private_name(part) is not None, "this package uses itself"),
    ):
        if is_bad:
            raise UnsafePathError(f"path {shown(whole)} has a component that {why}; nothing was touched")


def shown(text: str) -> str:
    """Escaped and shortened, so that a message cannot be forged or flooded by what it quotes."""
    return ascii(text) if len(text) <= 160 else ascii(text[:150]) + f"... ({len(text)} characters)"
