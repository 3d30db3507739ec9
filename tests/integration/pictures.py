"""Pictures for requests: deterministic, of any size, each different from the others."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["clip", "decoded", "encoded", "picture", "png_header"]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured boxes on a gradient."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (height, width, 3))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = int(random.integers(width)), int(random.integers(height))
        box = (x, y, x + max(2, width // 3), y + max(2, height // 4))
        draw.rectangle(box, fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def clip(frames: list[Image.Image]) -> bytes:
    """A lossless video of pictures of one size."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims width x height and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
