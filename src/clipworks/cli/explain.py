"""`clipworks explain`: what in an image a text speaks of, to the model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Json, facts


@command("analysis.explain.explain")
def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Any sentence.")],
    *,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", show_default=False)] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Measure deletion and insertion as well.")] = False,
    json: Json = False,
    **options: Any,
) -> int:
    """Show what in an image a text speaks of, to the model.

    \b
    Examples:
      clipworks explain photo.jpg "a dog" --out dog.png
      clipworks explain photo.jpg "a dog" --method gradient_attention --out dog.png --trust
    """
    from ..analysis.explain import explain as work
    from ..analysis.explain import trust_of

    found = work(image, text, out=out, **options)
    height, width = found.heat.shape
    row, column = divmod(int(found.heat.argmax()), width)
    values = {"image": found.key, "text": text, "similarity": round(found.similarity, 4), "method": found.method,
              "peak": {"x": round(column / width, 3), "y": round(row / height, 3)}}  # fmt: skip
    if trust:
        score = trust_of(found, options.get("encoder"), options.get("image_size"))
        values |= {"deletion": round(score.deletion, 4), "insertion": round(score.insertion, 4)}
    if out:
        values["picture"] = out
    facts(values, as_json=json)
    return 0
