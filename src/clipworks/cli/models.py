"""`clipworks models`: the names that `--encoder` takes."""

from __future__ import annotations

from ._command import command
from ._output import Csv, Json, emit


@command()
def models(*, json: Json = False, csv: Csv = False) -> None:
    """List the encoders that can be loaded by name.

    \b
    A path to a weights file and hf:org/name work wherever a name does.

    \b
    Examples:
      clipworks models
      clipworks embed photos --out photos.collection --encoder ViT-B-32/openai
    """
    from ..encoders.loading import models as known

    emit(known(), as_json=json, as_csv=csv)
