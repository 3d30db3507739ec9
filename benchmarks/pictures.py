"""Generated pictures and clips: any size, always the same, each different from the others."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

__all__ = ["clip", "jpeg", "media_type", "tiled_size", "unique_jpeg"]

_TILE = 448
_BLOCK = 16  # pixels: the blocks of JPEG (4:2:0) and H.264 are 16x16
_MARKED = 8  # of so many rows of blocks one is a picture's own: any tile of 128 pixels has one
_END = b"\xff\xd9"  # of a JPEG file
_FRAMES_PER_S = 4
_PAN = 4  # pixels from frame to frame
_STARTS = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
}
_STILL_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"}  # pictures in an MP4 file


def tiled_size(num_tiles: int) -> tuple[int, int]:
    """Width and height of a picture that becomes `num_tiles` tiles, the thumbnail included.

    1, or 3 to 13: a grid of two tiles or more brings a thumbnail along.
    """
    assert num_tiles == 1 or 3 <= num_tiles <= 13, num_tiles
    grid = max(1, num_tiles - 1)
    rows = max(row for row in range(1, int(grid**0.5) + 1) if grid % row == 0)
    return _TILE * (grid // rows), _TILE * rows


@functools.lru_cache(maxsize=64)
def jpeg(width: int, height: int, seed: int) -> bytes:
    """A JPEG file (quality 90) with about the detail of a photograph."""
    return _jpeg(_picture(width, height, seed))


def unique_jpeg(width: int, height: int, *key: int) -> bytes:
    """A JPEG file like those of `jpeg`, with other pixels for any other `key` (integers from 0).

    No cache of a server knows it, be it of files, of pixels or of tiles. The pictures of one size
    have most rows of blocks in common; one row is drawn for the key and takes every 8th place. That
    is 1 to 3 ms of work, where a new picture of 3840x2160 would be half a second of it.
    """
    head, parts = _common_parts(width, height)
    parts = parts.copy()
    _, own = _split(_jpeg(_picture(width, _BLOCK, *key), restart_marker_rows=1))
    parts[:: 2 * _MARKED] = own * len(parts[:: 2 * _MARKED])
    return head + b"".join(parts) + _END


def clip(num_frames: int, *key: int) -> bytes:
    """An MP4 file (H.264), 448x448 pixels, of which the service takes `num_frames` different ones.

    It takes the middles of equal parts of a clip, so the clip has four frames for each. All frames
    have other pixels for any other `key` (integers from 0): the upper edge of the first one is
    drawn by it, and the others build on the first, which alone is coded for the key.
    """
    import av

    first = _first_frame(num_frames).copy()
    first[:_BLOCK] = np.asarray(_picture(_TILE, _BLOCK, *key))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream, coded = _encode(container, [first])
        for number, data in enumerate([*coded, *_later_frames(num_frames)]):
            packet = av.Packet(data)
            packet.stream, packet.is_keyframe = stream, number == 0
            packet.pts = packet.dts = number
            packet.time_base, packet.duration = Fraction(1, _FRAMES_PER_S), 1
            container.mux(packet)
    return file.getvalue()


def media_type(data: bytes) -> str:
    """The MIME type of a picture's or a clip's file, from its first bytes.

    application/octet-stream for what is none of image/jpeg, png, webp, gif, bmp and tiff, and of
    video/mp4, webm and x-matroska.
    """
    for start, name in _STARTS.items():
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] not in _STILL_BRANDS:
        return "video/mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "video/webm" if b"webm" in data[:64] else "video/x-matroska"
    return "application/octet-stream"


@functools.lru_cache(maxsize=64)
def _common_parts(width: int, height: int) -> tuple[bytes, list[bytes]]:
    return _split(_jpeg(_picture(width, height), restart_marker_rows=1))


def _split(file: bytes) -> tuple[bytes, list[bytes]]:
    """What stands before the coded pixels, and these: a row of blocks, a marker, a row, ...

    Decoding starts anew behind each restart marker (FF D0 to FF D7), so that any row can take the
    place of another. In a row itself FF is always followed by 00.
    """
    scan = file.index(b"\xff\xda")  # nothing that Pillow writes before it has these two bytes
    start = scan + 2 + int.from_bytes(file[scan + 2 : scan + 4], "big")
    return file[:start], re.split(rb"(\xff[\xd0-\xd7])", file[start : -len(_END)])


def _jpeg(picture: Image.Image, **options: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def _film(num_frames: int) -> Iterator[NDArray[np.uint8]]:
    """A camera that moves to the right, with a sensor's noise; the upper edge stands still."""
    total = 4 * num_frames
    scene = np.asarray(_picture(_TILE + _PAN * total, _TILE)).astype(np.int16)
    random = np.random.default_rng(total)
    for place in range(0, _PAN * total, _PAN):
        grain = random.integers(-6, 7, (_TILE, _TILE, 1), np.int16)
        frame = (scene[:, place : place + _TILE] + grain).clip(0, 255).astype(np.uint8)
        frame[:_BLOCK] = scene[:_BLOCK, :_TILE]
        yield frame


@functools.lru_cache(maxsize=16)
def _first_frame(num_frames: int) -> NDArray[np.uint8]:
    return next(_film(num_frames))


@functools.lru_cache(maxsize=16)
def _later_frames(num_frames: int) -> list[bytes]:
    """All but the first, coded; the container itself stays empty."""
    import av

    with av.open(io.BytesIO(), "w", format="mp4") as container:
        return _encode(container, _film(num_frames))[1][1:]


def _encode(
    container: OutputContainer, frames: Iterable[NDArray[np.uint8]]
) -> tuple[VideoStream, list[bytes]]:
    """Frames in H.264: a whole picture first, then what changes from each one to the next.

    The quantiser is constant, so the first frame comes out the same whatever follows.
    """
    import av

    stream = container.add_stream("libx264", rate=_FRAMES_PER_S)
    stream.width, stream.height, stream.pix_fmt = _TILE, _TILE, "yuv420p"
    stream.options = {
        **{"preset": "veryfast", "qp": "23", "threads": "1"},
        **{"g": "1000000", "sc_threshold": "0", "bf": "0"},  # one whole picture, nothing backwards
    }
    packets = [
        packet
        for frame in frames
        for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    ]
    return stream, [bytes(packet) for packet in [*packets, *stream.encode()]]


def _picture(width: int, height: int, *key: int) -> Image.Image:
    """Boxes on coarse and fine noise."""
    random = np.random.default_rng([width, height, len(key), *key])
    coarse = random.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(20):
        x, y = int(random.integers(width)), int(random.integers(height))
        size = int(random.integers(10, max(11, width // 4)))
        draw.rectangle((x, y, x + size, y + size), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = random.integers(-6, 7, (height, width, 1), np.int16)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
