"""`clipworks export`: an encoder for a faster runtime, if it is true to the original on the user's own images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Json, emit, facts, note, say


@command("encoders.runtime.export.export", hide=("model", "out", "images", "texts"))
def export(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Name, path or hf:org/name.")] = "clipworks-small",
    *,
    images: Annotated[str, typer.Option("--images", metavar="SOURCE", help="Images of yours to measure it on.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="The folder to make.")],
    texts: Annotated[
        str | None, typer.Option("--texts", metavar="FILE", help="Texts of yours, a line each.", show_default=False)
    ] = None,
    json: Json = False,
    **options: Any,
) -> int:
    """Write an encoder for OpenVINO or ONNX Runtime, measured against fp32 on images of yours.

    \b
    low is the cosine to fp32 that 95 in 100 images reach, text_low the same of texts; below --bound it is refused:
    nothing is written, exit code 1. ratio is how many times as fast as fp32 in torch. The folder is an encoder
    wherever a name is (--encoder FOLDER).

    \b
    Examples:
      clipworks export --images photos --out fast
      clipworks export ViT-B-32/openai --images photos --runtime auto --precision auto --out fast
      clipworks embed photos --out photos.collection --encoder fast
    """
    from ..encoders.runtime.export import Refused
    from ..encoders.runtime.export import export as work

    try:
        report = work(model, out, images=images, texts=texts, **options)
    except Refused as refusal:
        emit([row.as_row() for row in refusal.rows], as_json=json)
        note(f"clipworks: {refusal}")
        return 1
    if json:
        facts({"path": report.path, "same": report.same, "images": report.images, "notes": report.notes,
               "chosen": report.chosen.as_row(), "rows": report.as_rows()}, as_json=True)  # fmt: skip
        return 0
    emit(report.as_rows())
    kept = "fits collections made with fp32" if report.same else "needs collections of its own"
    best = report.chosen
    say(f"{report.path}: {best.runtime} {best.precision}, {best.ratio:.2f} times as fast as fp32; {kept}")
    for sentence in report.notes:
        note(f"clipworks: {sentence}")
    return 0
