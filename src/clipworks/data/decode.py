"""One safe way from a file, bytes, a PIL image or an array to upright 8-bit RGB pixels.

Library, command line and server all come through here. The order of the checks is the protection: size in bytes,
then the format by its first bytes, then the number of pixels from the header, and only then are pixels decoded.
Whatever goes wrong is a `BadImage(key, reason)`, and no setting of Pillow is ever changed.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import BadImage, ClipworksError, check_choice, check_range

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ImageSource: TypeAlias = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|(?:pipe|data|file|https?|ftp|javascript):)", re.IGNORECASE)
_ORIENTATION, _TILE_WIDTH, _TILE_LENGTH = 0x0112, 0x0142, 0x0143
MAX_SCANS = 50  # of one JPEG, each as costly as the image; encoders write up to about 15
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # those with a segment behind them, and the end
# what people do hand in under an image's name, so that the reason can say it
_STRANGERS = (
    (b"version https://git-lfs", "a Git LFS pointer; the image itself was never downloaded"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"8BPS", "a Photoshop file"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML file"),
)


@dataclass(frozen=True)
class Limits:
    """What an image may cost before it is refused.

    Parameters
    ----------
    max_bytes : largest file, in bytes (default 128 MiB)
    max_pixels : largest width x height, read from the header before decoding (default 50 million, about 150 MB of
        decoded pixels per worker; a server should set less)
    formats : accepted formats, recognised by their first bytes, never by the file's name
    """

    max_bytes: int = 128 * 2**20
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        check_range("max_bytes", self.max_bytes, 1)
        check_range("max_pixels", self.max_pixels, 1)
        for name in self.formats:
            check_choice("formats", name, FORMATS)


DEFAULT_LIMITS = Limits()


def decode(
    source: ImageSource, *, key: str | None = None, limits: Limits = DEFAULT_LIMITS, min_side: int | None = None
) -> Image.Image:
    """Return `source` as an upright RGB image.

    Parameters
    ----------
    source : path, encoded bytes, PIL image, or uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)
    key : name used in errors (default: the path, or what the source is)
    limits : bytes, pixels and formats that are accepted
    min_side : decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as both sides keep at least this many pixels
        (faster, with a loss; None decodes in full)

    Returns
    -------
    PIL image, mode RGB, EXIF orientation applied, transparency over white, first frame of an animation,
    16-bit grey scaled to 8 bits; an ICC profile is ignored, as the published CLIP transforms do

    Raises
    ------
    BadImage
        For everything that cannot be used, with the key and the reason.

    Examples
    --------
    >>> decode(np.zeros((4, 6), np.uint8)).size
    (6, 4)
    """
    return Image.fromarray(decode_pixels(source, key=key, limits=limits, min_side=min_side))


def decode_pixels(
    source: ImageSource, *, key: str | None = None, limits: Limits = DEFAULT_LIMITS, min_side: int | None = None
) -> np.ndarray:
    """The same as `decode`, as a new uint8 array of shape (H, W, 3)."""
    name = key if key is not None else describe(source)
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, name, limits)
        if isinstance(source, Image.Image):
            _check_size(source.size, name, limits)
            pixels = _rgb(source, name)
            return _upright(pixels, _orientation(source))
        with _stream(source, name, limits) as stream:
            return _from_stream(stream, name, limits, min_side)
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged input; it all means the same here
        raise BadImage(name, _reason(error)) from error


def describe(source: Any) -> str:
    """A short name for an image that came without a key."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    return f"<{type(source).__name__}>"


def refuse_text(text: str) -> str | None:
    """Why a piece of text is not taken as a path (a URL, a command, a NUL byte), or None if it may be one."""
    if _URL.match(text):
        return "is a URL or a command, not a path; nothing is fetched or run. Download the image and give its path"
    return "has a NUL byte in its path" if "\0" in text else None


def sniff(head: bytes) -> str | None:
    """The format of an image by its first 16 bytes, or None.

    >>> sniff(b"GIF89a")
    'GIF'
    """
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM":
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return None


@contextmanager
def _stream(source: Any, key: str, limits: Limits) -> Iterator[IO[bytes]]:
    """Open a path or bytes for reading after the checks that need no content."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_bytes(len(source), key, limits)
        yield io.BytesIO(source)
        return
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise ClipworksError(f"an image must be a path, bytes, a PIL image or a uint8 array. Got {kind}.")
    text = os.fspath(source)
    if isinstance(source, str) and (refusal := refuse_text(text)):
        raise BadImage(key, refusal)
    status = os.stat(text)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise BadImage(key, "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    _check_bytes(status.st_size, key, limits)
    with Path(text).open("rb") as stream:
        yield stream


def _from_stream(stream: IO[bytes], key: str, limits: Limits, min_side: int | None) -> np.ndarray:
    head = stream.read(256)
    kind = sniff(head)
    if kind is None or kind not in limits.formats:
        what = f"is {_stranger(head)}" if kind is None else f"is a {kind} image"
        raise BadImage(key, f"{what}; accepted are {', '.join(limits.formats)}")
    stream.seek(0)
    with Image.open(stream, formats=[kind]) as image:
        _check_size(image.size, key, limits)
        if kind == "TIFF":
            _check_tile(image, key, limits)
        if kind != "JPEG":
            pixels = _rgb(image, key)
            return _upright(pixels, _orientation(image))  # after loading: Pillow turns a TIFF upright by itself
        orientation = _orientation(image)
        data = _whole(stream, limits)
        if (scans := count_scans(data)) > MAX_SCANS:
            raise BadImage(key, f"is a JPEG of {scans:,} scans; the limit is {MAX_SCANS}")
        if min_side is not None:
            image.draft(image.mode, (min(min_side, image.width), min(min_side, image.height)))
        fast = _turbo(image, data)
        return _upright(_rgb(image, key) if fast is None else fast, orientation)


def count_scans(data: bytes) -> int:
    """Number of scans of a JPEG; exact only beyond `MAX_SCANS`, an upper bound below.

    A few bytes of a progressive JPEG can ask for one more pass over all pixels, thousands of times.
    """
    if (most := data.count(b"\xff\xda")) <= MAX_SCANS:
        return most
    scans, place = 0, 2
    while found := _MARKER.search(data, place):  # the same bytes in metadata, or behind the image, are no scan
        marker, place = found[0][1], found.end()
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        place += int.from_bytes(data[place : place + 2], "big")  # over the segment, to the next marker
    return scans


def _whole(stream: IO[bytes], limits: Limits) -> bytes:
    """All bytes of a stream, whose position does not change."""
    position = stream.tell()
    stream.seek(0)
    data = stream.read(limits.max_bytes)
    stream.seek(position)
    return data


def _turbo(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Decode an ordinary JPEG through simplejpeg, bit-equal to Pillow and faster; None means: use Pillow."""
    if image.mode not in ("RGB", "L"):
        return None
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width)
    except ValueError:  # Pillow has the last word on a file that is not quite in order
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _rgb(image: Image.Image, key: str) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I;16"):  # convert("RGB") would clip everything above 255
        grey = ((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if mode in ("I", "F"):
        what = "32-bit integer" if mode == "I" else "floating-point"
        raise BadImage(key, f"has {what} pixels, whose range is not defined; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata says nothing about the pixels
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):  # stored on its side
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _from_array(array: np.ndarray, key: str, limits: Limits) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        allowed = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        raise BadImage(key, f"must be a uint8 array of shape {allowed}, not {array.dtype} {array.shape}")
    _check_size((array.shape[1], array.shape[0]), key, limits)
    if array.ndim == 3 and array.shape[2] == 4:
        return _rgb(Image.fromarray(array), key)
    return np.array(np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))


def _check_bytes(count: int, key: str, limits: Limits) -> None:
    if count == 0:
        raise BadImage(key, "is empty (0 bytes)")
    if count > limits.max_bytes:
        raise BadImage(key, f"has {count:,} bytes; the limit is {limits.max_bytes:,} (Limits.max_bytes)")


def _check_size(size: tuple[int, int], key: str, limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(key, "has no pixels")
    if width * height > limits.max_pixels:
        most = f"{limits.max_pixels:,} pixels (Limits.max_pixels)"
        raise BadImage(key, f"has {width} x {height} pixels; the limit is {most}")


def _check_tile(image: Any, key: str, limits: Limits) -> None:
    """A tile of a TIFF is decoded whole, however little of it lies in the image."""
    width, length = (image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if width * length > limits.max_pixels:
        most = f"{limits.max_pixels:,} pixels (Limits.max_pixels)"
        raise BadImage(key, f"has tiles of {width} x {length} pixels; the limit is {most}")


def _stranger(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what in _STRANGERS:
        if start.startswith(magic.lower()):
            return what
    if head[4:8] == b"ftyp":
        return f"a {head[8:12].decode('ascii', 'replace').strip()} file (HEIC, AVIF or video)"
    return "not a known image format"


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has too many pixels (Limits.max_pixels): {error}"
    if isinstance(error, UnidentifiedImageError):
        return "has a damaged header"
    if isinstance(error, ClipworksError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:  # of the system, not of a decoder
        return f"cannot be read ({error.strerror})"
    return f"is truncated or damaged ({str(error) or type(error).__name__})"
