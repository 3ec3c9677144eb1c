"""VeCLIP's captions: what is written about an image, joined with what is visible in it.

Claim: alt-texts enriched with a description of the image, mixed half and half with the alt-texts, teach far more than
the alt-texts alone (3M pairs, ViT-B/16, COCO R@1 image to text / text to image: 5.5 / 3.3 and 22.3 / 13.0; 200M: 52.2 /
34.9 and 67.2 / 48.4).

Formula: v = fuse(a, c), a the alt-text, c the description by a captioner; where the language model refuses, v = a.
In training t = a with probability p, else v.

Paper: Lai et al. 2024, VeCLIP: Improving CLIP Training via Visual-enriched Captions (ECCV).
Differs from the paper: no model is shipped; `fuse` is any function from prompts to texts (the paper: Vicuna), and
without one a rule joins the two. Descriptions are an argument (the paper: LLaVA). The prompt's wording is ours.
Defaults: fall back to the alt-text; p = 0.5 in `caption_pools(original=0.5)`, from knowledge of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..errors import ClipworksError
from ..registry import method

# how language models decline; at the start of an answer
_REFUSAL = re.compile(
    r"\W*(i('m| am)? (sorry|unable|cannot|can't|can not|do not|don't)|sorry\b|as an? (ai|language)\b|unable to\b"
    r"|i apologi[sz]e)",
    re.IGNORECASE,
)


@method(card="veclip", level="M")
def enrich_captions(
    alt_texts: Sequence[str],
    descriptions: Sequence[str],
    fuse: Callable[[list[str]], Sequence[str]] | None = None,
) -> list[str]:
    """Join each alt-text with the description of its image.

    Parameters
    ----------
    alt_texts : what was written about each image
    descriptions : what a captioner saw in it, without knowing the alt-text; may be empty
    fuse : from a list of prompts to one sentence each; None joins the two by rule

    Returns
    -------
    list of enriched captions; the alt-text where there is no description, or the model refused or wrote nothing

    Raises
    ------
    ClipworksError
        If there is not one description per alt-text, or not one answer per prompt.

    Inputs
    ------
    texts only

    Relations
    ---------
    `caption_pools` with original=0.5 trains on the mixture. Enriched captions alone lose proper names: always mix.

    References
    ----------
    Lai et al. 2024, VeCLIP: Improving CLIP Training via Visual-enriched Captions

    Examples
    --------
    >>> enrich_captions(["Toyota Supra 1998"], ["a red car on a road"])
    ['Toyota Supra 1998, a red car on a road']
    >>> enrich_captions(["Toyota Supra"], ["a red car"], lambda prompts: ["I cannot help with that."])
    ['Toyota Supra']
    """
    if len(descriptions) != len(alt_texts):
        raise ClipworksError(f"descriptions must be one per alt-text, {len(alt_texts)}. Got {len(descriptions)}.")
    pairs = list(zip(alt_texts, descriptions, strict=True))
    if fuse is None:
        return [join(alt, seen) for alt, seen in pairs]
    asked = [i for i, (_, seen) in enumerate(pairs) if seen.strip()]
    answers = list(fuse([fusion_prompt(*pairs[i]) for i in asked]))
    if len(answers) != len(asked):
        raise ClipworksError(f"fuse must return a text per prompt, {len(asked)} in all. Got {len(answers)}.")
    found = list(alt_texts)
    for i, answer in zip(asked, answers, strict=True):
        found[i] = found[i] if refused(answer) else " ".join(answer.split())
    return found


def fusion_prompt(alt: str, seen: str) -> str:
    """Return what a language model is asked: one sentence with the facts of one text and the visible of the other."""
    return (
        "Write one sentence that describes a picture. Keep the names and facts of the first text and the visible "
        "content of the second. Add nothing.\n"
        f"First: {' '.join(alt.split())}\nSecond: {' '.join(seen.split())}\nSentence:"
    )


def join(alt: str, seen: str) -> str:
    """Return both texts in one, without saying the same twice."""
    alt, seen = " ".join(alt.split()), " ".join(seen.split())
    if not seen or seen.lower() in alt.lower():
        return alt
    # capitals may be a name: then the alt-text stays as it is written
    said = alt.islower() and alt in seen.lower()
    return seen if not alt or said else f"{alt.rstrip(' .,;')}, {seen}"


def refused(answer: str) -> bool:
    """Whether an answer is empty or declines.

    >>> refused("I'm sorry, but I can't."), refused("A sorry dog in the rain"), refused("  ")
    (True, False, True)
    """
    return not answer.strip() or _REFUSAL.match(answer) is not None
