"""`async-ckpt delete`: delete the checkpoints that are named."""

from __future__ import annotations

from typing import Annotated

import typer

from ..format.names import is_url
from ..storage.delete import remove
from ..storage.filesystem import FileSystem
from .failing import UsageError
from .locating import Located, catalog_of, is_checkpoint, place_of
from .output import print_json


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints, as ROOT/TAG each, or ROOT and then tags.", metavar="ROOT/TAG...", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Delete these checkpoints, the newest or a damaged one too; nothing is asked.

    All are looked for before the first is deleted. A deletion is a rename first, so that a crash leaves nothing
    half-deleted under a checkpoint's name. `prune` deletes by rules.

    JSON: a list of the deleted tags
    """
    places = _places(targets)
    for place in places:
        remove(FileSystem(), place.catalog.root, place.tag)
        if not as_json:
            typer.echo(f"deleted {place.tag}")
    if as_json:
        print_json([place.tag for place in places])


def _places(targets: list[str]) -> list[Located]:
    first, *others = targets
    if is_url(first):
        raise UsageError("delete works on directories; in a store, `prune` deletes by rules. Nothing was deleted")
    if others and not is_checkpoint(first):
        catalog = catalog_of(first)
        for tag in others:
            catalog.path(tag)
        return [Located(catalog, tag, None) for tag in others]
    places = [place_of(target) for target in targets]
    for target, place in zip(targets, places, strict=True):
        if place.file is not None:
            raise UsageError(
                f"{target!r} is a file of checkpoint {place.tag!r}; only whole checkpoints are deleted. Nothing "
                "was deleted"
            )
    return places
