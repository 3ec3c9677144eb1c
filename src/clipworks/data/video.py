"""Frames of a video as images, one every so many seconds; the key says the second: `clip.mp4#t=12.5`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import ClipworksError, check_range, need
from .decode import DEFAULT_LIMITS, Limits
from .item import Item
from .sources import Source, existing, modified

# the container is named to FFmpeg, so that a playlist under a video's name cannot make it open other files or URLs
CONTAINERS = {
    ".mp4": "mov", ".m4v": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi", ".mpg": "mpeg",
    ".mpeg": "mpeg", ".ts": "mpegts",
}  # fmt: skip


class VideoSource(Source):
    """Frames of one video at 0, `every`, 2 x `every` ... seconds; needs `pip install 'clipworks[video]'`.

    At each of these times the first frame shown then or later is taken; the rotation that the file asks for is
    applied. A video that breaks off ends with one refused item.

    Parameters
    ----------
    path : the video file
    every : seconds between frames, at least 0.001
    limits : largest frame, in pixels
    """

    def __init__(self, path: str | os.PathLike, *, every: float = 1.0, limits: Limits = DEFAULT_LIMITS):
        self.av = need("av", "video")
        self.path = existing(path)
        super().__init__(str(self.path))
        self.every = float(check_range("every", every, 0.001, 1e9))
        self.limits = limits
        self.container = CONTAINERS.get(self.path.suffix.lower())
        if self.container is None:
            raise ClipworksError(f"video {self.name!r} has an unknown ending. Known are {', '.join(CONTAINERS)}.")
        with self._open():
            pass

    def _open(self) -> Any:
        try:
            container = self.av.open(str(self.path), format=self.container, options={"protocol_whitelist": "file"})
        except (self.av.FFmpegError, OSError, ValueError) as error:
            raise ClipworksError(f"video {self.name!r} cannot be read: {error}") from error
        if not container.streams.video:
            container.close()
            raise ClipworksError(f"video {self.name!r} has no picture track.")
        return container

    def __iter__(self) -> Iterator[Item]:
        mtime, step = modified(self.path), 0
        with self._open() as container:
            stream = container.streams.video[0]
            if refused := self._too_large(stream, step):
                yield refused
                return
            stream.thread_type = "AUTO"
            # a later frame may be larger than the file says: FFmpeg, which counts the padding too, shall not follow
            stream.codec_context.options = {"max_pixels": str(2 * self.limits.max_pixels + 2**16)}
            start = None
            try:
                for frame in container.decode(stream):
                    if frame.time is None:
                        continue
                    if refused := self._too_large(frame, step):
                        yield refused
                        return
                    start = frame.time if start is None else start
                    if frame.time - start + 1e-6 < step * self.every:
                        continue
                    step = int((frame.time - start + 1e-6) / self.every)
                    image = frame.to_image()
                    if rotation := getattr(frame, "rotation", 0):
                        image = image.rotate(rotation, expand=True)
                    yield Item(self._key(step), image, columns={"seconds": step * self.every}, mtime=mtime)
                    step += 1
            except (self.av.FFmpegError, OSError, ValueError, MemoryError) as error:
                yield Item(self._key(step), error=f"cannot be decoded from here on ({error})")
                return
        if step == 0:
            yield Item(self._key(0), error="the video has no frame that can be decoded")

    def _too_large(self, picture: Any, step: int) -> Item | None:
        """The item that says so, if a stream or a frame has too many pixels."""
        if picture.width * picture.height <= self.limits.max_pixels:
            return None
        most = f"{self.limits.max_pixels:,} (Limits.max_pixels)"
        reason = f"has {picture.width} x {picture.height} pixels; the limit is {most}"
        return Item(self._key(step), error=reason)

    def _key(self, step: int) -> str:
        return f"{self.path.name}#t={step * self.every:.10g}"
