"""`clipworks serve`: a collection as a service, with a page."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import note

PLACE = "What `clipworks embed` made."


@command("server.run.serve", hide=("say",))
def serve(
    collection: Annotated[str, typer.Argument(metavar="COLLECTION", help=PLACE)],
    **options: Any,
) -> int:
    """Serve a collection to browsers and programs: search, classes, masks, defects, a map.

    \b
    Only this machine reaches it unless --host says otherwise, and then a token is needed.

    \b
    Examples:
      clipworks serve photos.collection
      clipworks serve photos.collection --port 9000 --idle 10
      CLIPWORKS_TOKEN=... clipworks serve photos.collection --host 0.0.0.0 --allow-host photos.example.org
    """
    from ..server.run import serve as work

    answered = work(collection, **options, say=note)
    note(f"stopped; {answered:,} requests were answered")
    return 0
