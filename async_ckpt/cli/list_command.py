"""`async-ckpt list`: its options and help."""

from __future__ import annotations

from typing import Annotated

import typer

from .listing import list_checkpoints


def command(
    root: Annotated[
        str, typer.Argument(help="Directory or URL that holds the checkpoints.", metavar="ROOT", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List checkpoints with step, metadata, age, size and state; oldest first.

    JSON: a list of {tag, state, step, metadata, created_unix_ns, age_s, size_bytes, num_files, problem, copied_from,
    owner, owner_state, mirrored: [url]} and, for what is not committed, name; state is committed, damaged, staging,
    trash or aside.

    Manifests, presence and sizes of files are checked; `verify` also reads the contents. Exit code 1 if one is damaged.
    """
    raise typer.Exit(list_checkpoints(root, as_json=as_json))
