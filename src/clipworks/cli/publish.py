"""`clipworks publish`: a collection into an object store, where it is searched."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ._command import command
from ._output import Json, facts, say

ADDRESS = "Where it shall lie, such as s3://bucket/photos.shards/000.collection"


@command("store.object_store.publish", hide=("address",))
def publish(
    collection: Annotated[str, typer.Argument(metavar="COLLECTION", help="What `clipworks embed` made.")],
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help=ADDRESS)],
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Put a collection into an object store; `clipworks search ADDRESS` asks it there.

    \b
    Several below one address are searched as one. Credentials and endpoint are those of the environment.

    \b
    Examples:
      clipworks publish photos.collection s3://bucket/photos.shards/000.collection
      clipworks search s3://bucket/photos.shards "a red bicycle"
    """
    from ..store.object_store import publish as work

    report = work(collection, address, **options)
    if json:
        facts(dataclasses.asdict(report), as_json=True)
    else:
        say(str(report))
    return 0
