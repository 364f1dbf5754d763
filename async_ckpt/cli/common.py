"""What commands have in common: arguments; from what people type (a root, ROOT/TAG, ROOT/TAG/file) to a catalog, a tag
and a file; exit codes; and what they print: JSON, one line of an error, bars, or tables through rich, which is imported
only for those."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnsafePathError, escaped
from ..format.names import MANIFEST_NAME, SINGLE_FILES_NAME, is_url, single_file_tag
from ..reading.catalog import Catalog
from ..reading.committed import find_checkpoint
from ..storage.filesystem import read_side_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..format.tensors import OtherInfo, TensorExtent

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
_PIPE_COLUMNS = 240
_PAD_COLUMNS = 40


def add_root(parser: argparse.ArgumentParser, kind: str = "directory") -> None:
    """The argument ROOT."""
    parser.add_argument("root", metavar="ROOT", help=f"{kind} that holds the checkpoints")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json."""
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")


def number(kind: Callable[[str], Any], least: float, most: float = float("inf")) -> Callable[[str], Any]:
    """An argument's type: a number within bounds."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            bound = f"at least {least:g}" if most == float("inf") else f"between {least:g} and {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = kind.__name__
    return parse


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
    """The catalog of an existing root directory, of a folder of single-file checkpoints, or of a mirror's URL. Raises
    CheckpointNotFoundError: there is no such directory, or nothing in a store. ConfigError: it is a checkpoint."""
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
    """The checkpoint (or file of one) at ROOT/TAG or ROOT/TAG/file, or the one that is one file. Raises
    CheckpointNotFoundError: there is no checkpoint at or above it. ConfigError: it is a root."""
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
    """For commands that delete: a checkpoint that is one file does not lie where its manifest does. Raises ConfigError:
    these are single files."""
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


def exit_code(error: BaseException) -> int | None:
    """The exit code for a known kind of failure; None for a bug."""
    if isinstance(error, (ConfigError, UnsafePathError)):
        return EXIT_USAGE
    if isinstance(error, FileNotFoundError):
        return EXIT_NOT_FOUND
    if isinstance(error, (CheckpointError, OSError, ImportError)):
        return EXIT_FAILED
    return None


def one_line(error: BaseException) -> str:
    """The message without line breaks or control characters."""
    text = str(error) or type(error).__name__
    if isinstance(error, ImportError) and error.name:
        text = f"this command needs the package {error.name!r}: pip install {error.name}"
    return escaped(" ".join(text.split()))


def key_name(leaf: TensorExtent | OtherInfo) -> str:
    """The key path of a leaf such as ``['a.b'][0]``: no two leaves of a file have the same."""
    steps = (repr(step[1:]) if step.startswith("s") else step for step in leaf.key)
    return "".join(step if step.startswith("[") else f"[{step}]" for step in steps)


def print_json(value: Any) -> None:
    """One JSON document on standard output, indented for a terminal; ASCII, so that no text can steer one."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def console() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is cut for a program that reads it."""
    from rich.console import Console

    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


@contextlib.contextmanager
def bar(*, hidden: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """One bar: call it with what is done, bytes done, and all bytes. Nothing is drawn unless standard error is a
    terminal."""
    if hidden or not sys.stderr.isatty():
        yield lambda doing, done_bytes, total_bytes: None
        return
    from ..observers.progress import progress_bar, terminal

    with progress_bar(terminal()) as drawn:
        task = drawn.add_task("", total=None)
        yield lambda doing, done_bytes, total_bytes: drawn.update(
            task, description=doing, completed=done_bytes, total=total_bytes
        )


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> None:
    """A table without frames, into a pipe plain text, nothing cut or wrapped; `right` names the columns that hold
    numbers, `styles` has one style per row."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        # One long cell (metadata, an error) does not make all lines as long.
        widths = [
            max(len(cell) for cell in column if len(cell) <= _PAD_COLUMNS)
            for column in zip(columns, *cells, strict=True)
        ]
        for line in (columns, *cells):
            parts = [
                cell.rjust(width) if name in right else cell.ljust(width)
                for name, cell, width in zip(columns, line, widths, strict=True)
            ]
            print("  ".join(parts).rstrip())
        return
    console().print(drawn_table(columns, cells, right=right, styles=styles))


def drawn_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str], styles: Sequence[str] = ()
) -> Any:
    """The table of `print_table` as rich draws it on a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column in right
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number or column == columns[0])
    for index, row in enumerate(rows):
        table.add_row(*(Text(escaped(cell)) for cell in row), style=styles[index] if styles else "")
    return table


def picked(thing: object, names: str) -> dict[str, Any]:
    """Some attributes of `thing`, by name, for JSON."""
    return {name: getattr(thing, name) for name in names.split()}
