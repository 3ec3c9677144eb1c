"""What requests and answers look like; every field has a limit, and what is not named here is refused."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import ClipworksError

TEXT = 2048  # bytes of one text
K = 1000  # hits of one request
DEEPEST = 10_000  # hits of one query over all its pages
NAMES = 200  # class names
TEXTS, IMAGES = 64, 16  # of one request
IDS = 20_000  # of one selection
GOOD = 32  # images of good parts


def _text(value: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if size > TEXT:
        raise ValueError(f"may have {TEXT} bytes")
    if not value.strip() or "\0" in value:
        raise ValueError("must not be empty, nor hold a zero byte")
    return value


def _image(value: str) -> str:
    """Base64, with or without the head of a data: address; checked to the last character when it is decoded."""
    if "," in value[:64] and value.startswith("data:image/"):
        value = value.partition(",")[2]
    if value[:12].lower().startswith(("http:", "https:", "file:", "ftp:", "data:")):
        raise ValueError("must be the image itself in base64; nothing is fetched")
    return value


def image_bytes(value: str) -> bytes:
    """The bytes of an image in base64."""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ClipworksError("an image must be given in base64.") from None


FILLED: dict[str, Any] = {"pattern": r"^[^\x00]*[^\s\x00][^\x00]*$"}  # most of what `_text` asks for
Text = Annotated[str, Field(max_length=TEXT, json_schema_extra=FILLED), AfterValidator(_text)]
Name = Annotated[str, Field(max_length=200, json_schema_extra=FILLED), AfterValidator(_text)]
Image = Annotated[str, Field(description="An image file in base64; nothing is fetched."), AfterValidator(_image)]
Id = Annotated[str, Field(pattern="^[0-9a-f]{16}$", description="Id of an image of the collection.")]
WHOLE = BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)  # 5.0 is 5 in JSON
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Vector = Annotated[list[Number], Field(max_length=8192)]
Word = Annotated[str, Field(max_length=500)]


class Strict(BaseModel):
    """Fields that are not named are refused, and so are values of another type: "5" is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Condition(Strict):
    """What a column must be."""

    column: Annotated[str, Field(max_length=200)]
    operator: Annotated[str, Field(max_length=10, description="is, is not, below, at most, above, at least, contains, "
                                                              "in, missing, present")] = "is"  # fmt: skip
    value: Word | bool | Number | Annotated[list[Word | Number], Field(max_length=100)] | None = None


class Search(Strict):
    """Words, an image, one of the collection, a vector, or several of them; none of them lists the collection."""

    text: Text | None = None
    minus: Annotated[list[Text], Field(max_length=8, description="Words to move away from.")] = []
    image: Image | None = None
    like: Annotated[Id | None, Field(description="Images like this one of the collection.")] = None
    vector: Vector | None = None
    where: Annotated[list[Condition], Field(max_length=16)] = []
    columns: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=32)] = ["label", "caption"]
    k: Annotated[int, Field(ge=1, le=K), WHOLE] = 20
    offset: Annotated[int, Field(ge=0, le=DEEPEST), WHOLE] = 0


class Item(BaseModel):
    """One image of the collection."""

    id: str
    name: str
    score: float | None = None
    columns: dict[str, Any] = {}


class Ranked(BaseModel):
    """Images, best first."""

    items: list[Item]
    total: Annotated[int, Field(description="Images that meet the conditions.")]
    more: Annotated[bool, Field(description="Whether the next page has any.")]


class Embed(Strict):
    """Texts and images to vectors of the collection's space."""

    texts: Annotated[list[Text], Field(max_length=TEXTS)] = []
    images: Annotated[list[Image], Field(max_length=IMAGES)] = []


class Vectors(BaseModel):
    """Unit vectors, those of the texts first."""

    dim: int
    fingerprint: str
    vectors: list[list[float]]


class Classify(Strict):
    """Which of the names images show."""

    names: Annotated[list[Name], Field(min_length=1, max_length=NAMES)]
    images: Annotated[list[Image], Field(max_length=IMAGES)] = []
    ids: Annotated[list[Id], Field(max_length=K)] = []
    templates: Annotated[list[Annotated[str, Field(max_length=200)]] | None, Field(max_length=20)] = None
    none: Annotated[
        bool, Field(description='Whether "none of these" is an answer, at a threshold between the images of the '
                                "collection that fit the names and those that do not.")
    ] = True  # fmt: skip


class Classified(BaseModel):
    """The answer for one image."""

    id: str | None
    label: str
    scores: dict[str, float]
    cosines: dict[str, float]
    fit: float | None


class Answers(BaseModel):
    """One answer per image, those given as files first."""

    answers: list[Classified]
    threshold: Annotated[float | None, Field(description="Fits at or below it are none of these.")]


class Segment(Strict):
    """Which pixels of an image each name means."""

    names: Annotated[list[Name], Field(min_length=1, max_length=32)]
    image: Image | None = None
    id: Id | None = None
    background: Annotated[Number | None, Field(ge=0, le=1, description="Probability that a name must reach.")] = None
    masks: bool = False


class Region(BaseModel):
    """One name found in an image."""

    name: str
    share: float
    mean: float
    largest: float
    mask: Annotated[dict[str, Any] | None, Field(description="COCO's run-length code.")] = None


class Segmented(BaseModel):
    """The names found, and the image with its mask over it."""

    width: int
    height: int
    names: list[Region]
    overlay: Annotated[str, Field(description="A JPEG as a data: address.")]


class Inspect(Strict):
    """Whether and where an image is unlike good ones, or what words call damaged."""

    image: Image | None = None
    id: Id | None = None
    normal: Annotated[list[Id], Field(max_length=GOOD, description="Images of good parts in the collection.")] = []
    normal_images: Annotated[list[Image], Field(max_length=GOOD)] = []
    name: Name = "object"


class Inspected(BaseModel):
    """The verdict, and the image with its heat over it."""

    method: str
    defective: bool
    score: float
    threshold: float
    regions: list[dict[str, float]]
    overlay: Annotated[str, Field(description="A JPEG as a data: address.")]


class Compare(Strict):
    """Two selections; without the second, the rest of the collection."""

    a: Annotated[list[Id], Field(min_length=1, max_length=IDS)]
    b: Annotated[list[Id] | None, Field(min_length=1, max_length=IDS)] = None


class Telling(BaseModel):
    """A word that fits one selection better than the other."""

    word: str
    difference: float
    auroc: Annotated[float, Field(description="How often it fits an image of the one better than of the other.")]


class Differences(BaseModel):
    """Words for either side, the most telling first."""

    a: list[Telling]
    b: list[Telling]
    counts: list[int]


class Map(BaseModel):
    """Images at their places in two dimensions, one entry per image in every list."""

    total: Annotated[int, Field(description="Images of the collection; a large one is thinned out.")]
    ids: list[str]
    names: list[str]
    labels: list[str | None]
    x: list[float]
    y: list[float]
    explained: Annotated[list[float], Field(description="Share of the variance along either axis.")]


class Value(BaseModel):
    """A value of a column, and how many images have it."""

    value: str | bool
    count: int


class Column(BaseModel):
    """A column of the collection, with its values where they are few."""

    name: str
    type: str
    values: list[Value] | None


class Served(BaseModel):
    """What is served."""

    rows: int
    dim: int
    encoder: str | None
    fingerprint: str
    version: str
    columns: list[Column]
    limits: dict[str, int]
    clipworks: str


class Login(Strict):
    """The server's token."""

    token: Annotated[str, Field(max_length=512)]


class Failure(BaseModel):
    """What every refusal looks like."""

    error: str
