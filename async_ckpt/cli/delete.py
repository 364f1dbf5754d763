"""`async-ckpt delete`: delete the checkpoints that are named."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..format.names import is_url
from ..storage.delete import remove
from ..storage.filesystem import FileSystem
from .common import EXIT_OK, Located, add_json, catalog_of, is_checkpoint, place_of, print_json, refuse_single_files


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", metavar="ROOT/TAG", nargs="+", help="checkpoints; or ROOT, and then tags")
    add_json(parser)


def command(targets: list[str], as_json: bool) -> int:
    """Delete these checkpoints, the newest or a damaged one too; nothing is asked.

    All are looked for before the first is deleted. A deletion is a rename first, so that a crash leaves nothing
    half-deleted under a checkpoint's name. `prune` deletes by rules.

    JSON: a list of the deleted tags
    """
    places = _places(targets)
    for place in places:
        refuse_single_files(place.catalog)
    for place in places:
        remove(FileSystem(), place.catalog.root, place.tag)
        if not as_json:
            print(f"deleted {place.tag}")
    if as_json:
        print_json([place.tag for place in places])
    return EXIT_OK


def _places(targets: list[str]) -> list[Located]:
    first, *others = targets
    if is_url(first):
        raise ConfigError("delete works on directories; in a store, `prune` deletes by rules. Nothing was deleted")
    if others and not is_checkpoint(first):
        catalog = catalog_of(first)
        for tag in others:
            catalog.path(tag)
        return [Located(catalog, tag, None) for tag in others]
    places = [place_of(target) for target in targets]
    for target, place in zip(targets, places, strict=True):
        if place.file is not None:
            raise ConfigError(
                f"{target!r} is a file of checkpoint {place.tag!r}; only whole checkpoints are deleted. Nothing "
                "was deleted"
            )
    return places
