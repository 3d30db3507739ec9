"""Generated pictures and clips: any size, always the same, each different from the others."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["clip", "jpeg", "tiled_size", "unique_jpeg"]

_TILE = 448


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
    file = io.BytesIO()
    _picture(width, height, seed).save(file, "JPEG", quality=90)
    return file.getvalue()


def unique_jpeg(width: int, height: int, number: int, *, drawn: int = 4) -> bytes:
    """The `number`-th picture of this size: other bytes than all others, for `drawn` pixel sets.

    A server that caches by content cannot know it, and drawing it costs nothing: the number is a
    comment segment (marker FF FE) behind the start of the file.
    """
    file = jpeg(width, height, number % drawn)
    comment = str(number).encode()
    return file[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + file[2:]


@functools.lru_cache(maxsize=16)
def clip(num_frames: int, seed: int) -> bytes:
    """An MP4 file (H.264), 448x448 pixels, of which the service takes `num_frames` different ones.

    It takes the middles of equal parts of a clip, so the clip has four frames for each.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = _TILE, _TILE, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", "threads": "1"}
        for number in range(4 * num_frames):
            pixels = np.asarray(_picture(_TILE, _TILE, seed * 1000 + number))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """Boxes on coarse and fine noise."""
    random = np.random.default_rng([width, height, seed])
    coarse = random.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(20):
        x, y = int(random.integers(width)), int(random.integers(height))
        size = int(random.integers(10, max(11, width // 4)))
        draw.rectangle((x, y, x + size, y + size), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = random.integers(-6, 7, (height, width, 1), np.int16)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def media_type(data: bytes) -> str:
    """Of a picture or clip, by its first bytes."""
    kinds = {
        b"\xff\xd8\xff": "image/jpeg",
        b"\x89PNG": "image/png",
        b"GIF8": "image/gif",
        b"BM": "image/bmp",
        b"\x1a\x45\xdf\xa3": "video/webm",
    }
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        return "video/mp4"
    return next(
        (kind for start, kind in kinds.items() if data.startswith(start)),
        "application/octet-stream",
    )
