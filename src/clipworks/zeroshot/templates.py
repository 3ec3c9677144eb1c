"""Sentence templates for class names, as data in `templates.json`; `{}` stands for the name.

`default` are the seven templates that forward selection kept for CLIP on ImageNet, `imagenet` the eighty they were
chosen from (both published with CLIP), `simple` is one plain sentence, `name` the bare name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ClipworksError, UnknownName, check_choice


@functools.lru_cache(maxsize=1)
def template_sets() -> dict[str, list[str]]:
    """Return every named set of templates."""
    return json.loads((Path(__file__).parent / "templates.json").read_text(encoding="utf-8"))


def resolve_templates(templates: str | Sequence[str]) -> list[str]:
    """Return the templates meant by a set's name, by one template or by a list of templates.

    Parameters
    ----------
    templates : name of a set ("default", "simple", "name", "imagenet"), a template, or several; every template
        holds `{}` once, where the class name goes

    Raises
    ------
    ClipworksError
        If the name is unknown, the list is empty or a template does not hold `{}` exactly once.

    >>> resolve_templates("a sketch of a {}.")
    ['a sketch of a {}.']
    """
    if isinstance(templates, str):
        if "{" not in templates:
            if " " in templates:  # it was meant as a sentence
                known = ", ".join(map(repr, template_sets()))
                raise UnknownName(f"templates must be one of {known}, or a sentence with {{}} where the name goes. "
                                  f"Got {templates!r}.")  # fmt: skip
            check_choice("templates", templates, template_sets())
            return list(template_sets()[templates])
        templates = [templates]
    if not templates:
        raise ClipworksError("templates must hold at least one template. Got an empty list.")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ClipworksError(
                f"templates must each hold {{}} exactly once, where the name goes. Got {template!r}."
            )
    return list(templates)
