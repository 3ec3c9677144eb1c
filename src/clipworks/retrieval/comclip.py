"""ComCLIP: an image looked at again, part by part, for what a caption names, before image and caption are compared.

Claim: CLIP's vector of an image is a bag of things. Adding those of sub-images that show the subject, the object and
what joins them, weighed by how well each fits its words, improves compositional matching without training (Winoground,
VL-checklist, SVO, ComVG).

Formula: s_k = t_k . I_k for sub-image I_k and its words t_k;  w_k = s_k / sum_j s_j;  I' = I + lambda sum_k w_k I_k;
score = cos(I', t).  A sub-image is black outside the boxes of its entity; that of a predicate shows subject and object.
What is not found is shown by the whole image.

Paper: Jiang, He, Xu and Wang 2024, ComCLIP: Training-Free Compositional Image and Text Matching (NAACL).
Differs from the paper: unit vectors throughout (the released scripts differ from each other), so that an image in which
nothing is found has exactly CLIP's score; relevances of zero or less count as a small positive number, since they would
turn the weights round; a softmax is offered. Captions are taken apart and regions found by functions that the user
gives (`parse_caption` and boxes with names are enough; the paper asks language models and a dense captioner), each
caption on its own.
Defaults: sum rule, lambda = 1, black, from the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ..errors import ClipworksError, check_choice, check_range
from ..registry import method
from ..zeroshot.sentences import as_vectors, softmax
from .captions import Parts, parse_caption

RULES = ("sum", "softmax")
FILLS = ("black", "mean", "blur")
LEAST = 1e-3  # what a relevance of zero or less counts
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Regions = Callable[[Any, str], Sequence[Box]]  # image, entity -> its boxes, none if it is not found


@method(card="comclip", level="M")
def comclip(
    image: Any,
    parts: Any,
    words: Any,
    text: Any,
    *,
    strength: float = 1.0,
    rule: str = "sum",
    temperature: float = 0.01,
) -> np.ndarray:
    """Score images against captions, with what the captions name looked at apart.

    Parameters
    ----------
    image : vectors of the whole images, shape (n, dim)
    parts : vectors of K sub-images of each, shape (n, K, dim)
    words : vectors of what each is to show, shape (n, K, dim)
    text : vectors of the captions, shape (n, dim)
    strength : lambda of the formula; 0 is plain CLIP
    rule : how relevances become weights, "sum" (paper) or "softmax"
    temperature : of the softmax

    Returns
    -------
    float32 (n,), cosines

    Raises
    ------
    ClipworksError
        If shapes do not fit, a value is not finite, or an argument is out of range.

    Inputs
    ------
    features of images, their sub-images, words and captions; nothing is trained

    Relations
    ---------
    `match` makes the sub-images. It costs K passes per pair of image and caption: use it for the first hits only.

    References
    ----------
    Jiang, He, Xu and Wang 2024, ComCLIP: Training-Free Compositional Image and Text Matching

    Examples
    --------
    >>> scene, dog, ball = np.array([[0.6, 0.8, 0.0]]), np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    >>> found = comclip(scene, np.stack([dog, ball])[None], np.stack([dog, ball])[None], np.array([[0.8, 0.6, 0.0]]))
    >>> round(float(found[0]), 3)  # plain: 0.96
    0.975
    """
    check_choice("rule", rule, RULES)
    check_range("strength", strength, 0.0)
    whole = as_vectors("image", image, least=1)
    caption = as_vectors("text", text, whole.shape[1])
    count = np.shape(parts)[1] if np.ndim(parts) == 3 else 0
    shape = (len(whole), count, whole.shape[1])
    if len(caption) != len(whole):
        raise ClipworksError(f"text must hold one caption per image ({len(whole)}). Got {len(caption)}.")
    for name, given in (("parts", parts), ("words", words)):
        if np.shape(given) != shape or not count:
            raise ClipworksError(f"{name} must have the shape {shape}, with one part or more. Got {np.shape(given)}.")
    seen, told = (as_vectors(n, np.reshape(np.asarray(g), (-1, shape[2]))).reshape(shape)
                  for n, g in (("parts", parts), ("words", words)))  # fmt: skip
    weights = part_weights((seen * told).sum(2), rule, temperature)
    total = whole + strength * (weights[:, :, None] * seen).sum(1)
    return (as_vectors("image", total) * caption).sum(1)


def part_weights(relevance: np.ndarray, rule: str = "sum", temperature: float = 0.01) -> np.ndarray:
    """Weights of sub-images from their relevances (n, K); rows sum to 1.

    >>> part_weights(np.array([[0.2, 0.2], [0.3, 0.1]])).round(2).tolist()
    [[0.5, 0.5], [0.75, 0.25]]
    """
    if rule == "softmax":
        check_range("temperature", temperature, 1e-6)
        return softmax(np.asarray(relevance) / temperature)
    positive = np.where(np.asarray(relevance) > 0, relevance, LEAST * np.abs(relevance).max(1, keepdims=True))
    total = positive.sum(1, keepdims=True)
    return np.where(total > 0, positive / np.where(total > 0, total, 1), 1 / positive.shape[1])


def sub_image(image: Image.Image, boxes: Sequence[Box], fill: str = "black") -> Image.Image:
    """The image with everything outside some boxes filled; the whole image where there is no box.

    Parameters
    ----------
    image : RGB
    boxes : left, top, right, bottom in pixels; their order does not matter
    fill : "black" (paper), "mean" (the image's mean colour) or "blur" (out of focus)
    """
    check_choice("fill", fill, FILLS)
    if not boxes:
        return image
    if fill == "blur":
        ground = image.filter(ImageFilter.GaussianBlur(max(image.size) / 30))
    else:
        colour = np.asarray(image).reshape(-1, 3).mean(0).round() if fill == "mean" else np.zeros(3)
        ground = Image.new("RGB", image.size, tuple(int(c) for c in colour))
    for box in boxes:
        left, top = (max(0, round(v)) for v in box[:2])
        corner = (left, top, min(image.width, round(box[2])), min(image.height, round(box[3])))
        if corner[2] > left and corner[3] > top:
            ground.paste(image.crop(corner), (left, top))
    return ground


@dataclass
class Match:
    """Scores of pairs of image and caption.

    Attributes
    ----------
    scores : with the parts looked at
    plain : CLIP's own
    found : how many entities of each caption had a region; 0 where the score is the plain one
    """

    scores: np.ndarray
    plain: np.ndarray
    found: np.ndarray


def match(
    pairs: Sequence[tuple[Image.Image, str]],
    encoder: Any,
    regions: Regions,
    *,
    parse: Callable[[str], Parts] = parse_caption,
    strength: float = 1.0,
    rule: str = "sum",
    fill: str = "black",
    batch_size: int = 32,
) -> Match:
    """Score pairs of image and caption.

    Parameters
    ----------
    pairs : RGB images with captions
    encoder : of images and texts
    regions : function of an image and an entity's words that returns its boxes, or nothing
    parse : function of one caption that returns its entities and predicates
    strength, rule : as in `comclip`
    fill : of sub-images, see `sub_image`
    batch_size : images per pass
    """
    known: dict[int, int] = {}
    pictures: list[Image.Image] = []
    plans: list[list[tuple[str, int]]] = []
    whole, counts = [], []
    for image, caption in pairs:
        if id(image) not in known:  # an image that stands in several pairs is encoded once
            known[id(image)] = len(pictures)
            pictures.append(image)
        own = known[id(image)]
        told, plan = parse(caption), []
        boxes = [list(regions(image, entity)) for entity in told.entities]
        for entity, places in zip(told.entities, boxes, strict=True):
            plan.append((entity, _add(pictures, image, places, fill) if places else own))
        for words, subject, thing in told.predicates:
            both = boxes[subject] + boxes[thing] if boxes[subject] and boxes[thing] else []
            plan.append((words, _add(pictures, image, both, fill) if both else own))
        plans.append(plan or [(caption, own)])
        whole.append(own)
        counts.append(sum(bool(places) for places in boxes))
    seen = as_vectors("images", encoder.images(pictures, batch_size=batch_size))
    sentences = [caption for _, caption in pairs] + [words for plan in plans for words, _ in plan]
    distinct = list(dict.fromkeys(sentences))
    told_by = dict(zip(distinct, as_vectors("texts", encoder.texts(distinct)), strict=True))
    plain, scores = [], []
    for (_, caption), plan, own in zip(pairs, plans, whole, strict=True):
        text = told_by[caption][None]
        parts, words_of = seen[[i for _, i in plan]][None], np.stack([told_by[said] for said, _ in plan])[None]
        plain.append(float(seen[own] @ text[0]))
        scores.append(float(comclip(seen[own : own + 1], parts, words_of, text, strength=strength, rule=rule)[0]))
    return Match(np.array(scores), np.array(plain), np.array(counts))


def winoground(scores: np.ndarray) -> dict[str, float]:
    """Winoground's three accuracies from scores (n, 2, 2) of captions against images; ties count as wrong.

    >>> winoground(np.array([[[0.9, 0.1], [0.2, 0.8]]]))
    {'text': 1.0, 'image': 1.0, 'group': 1.0}
    """
    s = np.asarray(scores, float)
    if s.ndim != 3 or s.shape[1:] != (2, 2) or not len(s):
        raise ClipworksError(f"scores must have the shape (n, 2, 2), captions by images. Got {s.shape}.")
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return {"text": float(text.mean()), "image": float(image.mean()), "group": float((text & image).mean())}


def _add(pictures: list[Image.Image], image: Image.Image, boxes: Sequence[Box], fill: str) -> int:
    pictures.append(sub_image(image, boxes, fill))
    return len(pictures) - 1
