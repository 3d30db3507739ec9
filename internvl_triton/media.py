"""Encoded pictures and clips to pixels, within limits and without trusting their headers."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import struct
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from internvl_triton.errors import ImageTooLarge, InvalidImage, InvalidRequest, InvalidVideo
from internvl_triton.limits import Limits

__all__ = [
    "content_digest",
    "decode_image",
    "decode_video",
    "frame_indices",
    "packed_pixels",
    "unwrap_data_url",
]

# PIL reads many more; these are the formats people send, and none of them runs a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_DATA_URL = re.compile(rb"data:[^,]{0,256}?;base64,", re.IGNORECASE)


def unwrap_data_url(data: bytes, what: str) -> bytes:
    """The file itself: `data` as it is, or the payload of a `data:...;base64,` URL.

    Raises InvalidRequest for a URL of another kind: the server fetches nothing.
    """
    head = data[:8].lower()
    if head.startswith(b"data:"):
        match = _DATA_URL.match(data[:300])
        if not match:
            raise InvalidRequest(f"{what} is a data: URL without ';base64,'")
        try:
            return base64.b64decode(data[match.end() :], validate=True)
        except binascii.Error as error:
            raise InvalidRequest(f"{what} is a data: URL with broken base64: {error}") from error
    if head.startswith((b"http:", b"https:", b"file:")):
        raise InvalidRequest(
            f"{what} is a URL; the server fetches nothing: send the file's bytes or a data: URL"
        )
    return data


def decode_image(data: bytes, what: str, limits: Limits) -> NDArray[np.uint32]:
    """The picture's `packed_pixels`. `what` names it in errors, such as "image 1".

    Raises InvalidImage (not an image, truncated) or ImageTooLarge, the latter before decoding.
    """
    if len(data) > limits.max_image_bytes:
        raise ImageTooLarge(
            f"{what} has {len(data)} bytes; the limit is {limits.max_image_bytes} bytes"
        )
    try:
        with warnings.catch_warnings():
            # Sizes are checked below; PIL's warnings about odd metadata concern nobody here.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_pixels(
                image.size[0] * image.size[1], f"{image.size[0]}x{image.size[1]}", what, limits
            )
            pixels = _decode_jpeg(data, image)
            if pixels is None:
                pixels = packed_pixels(image)
    except Image.DecompressionBombError as error:
        number = re.search(r"\d+", str(error))
        _check_pixels(int(number[0]) if number else 2**62, "", what, limits)
        raise ImageTooLarge(f"{what} has too many pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(
            f"{what} is not a picture in a supported format ({', '.join(_FORMATS)}); "
            f"its {len(data)} bytes start with {data[:8].hex() or 'nothing'}"
        ) from error
    except ImageTooLarge:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:
        # PIL's own ways to say that a file is truncated or corrupt.
        raise InvalidImage(f"{what} is truncated or corrupt: {_reason(error)}") from error
    if pixels.size < 1:
        raise InvalidImage(f"{what} is empty: {image.size[0]}x{image.size[1]} pixels")
    return pixels


def packed_pixels(image: Image.Image) -> NDArray[np.uint32]:
    """uint32 (height, width): a pixel's bytes are red, green, blue and one that says nothing.

    Alpha is dropped and the EXIF orientation ignored, as in the reference.
    """
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    return np.frombuffer(rgb.tobytes("raw", "RGBX"), np.uint32).reshape(rgb.size[::-1])


def _decode_jpeg(data: bytes, image: Image.Image) -> NDArray[np.uint32] | None:
    """PIL's own pixels, by the same libjpeg-turbo, which takes a third less time where it has the
    whole file at once and writes packed pixels.

    None for what is not a JPEG of three colours, or draws as much as a warning: PIL decides then.
    """
    from simplejpeg import decode_jpeg

    if image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        channels: NDArray[np.uint8] = decode_jpeg(data, "RGBX")
    except ValueError:
        return None
    return channels.view(np.uint32)[:, :, 0]


def _check_pixels(pixels: int, size: str, what: str, limits: Limits) -> None:
    if pixels > limits.max_image_pixels:
        raise ImageTooLarge(
            f"{what} is {size + ', ' if size else ''}{pixels / 1e6:.0f} megapixels; the limit is "
            f"{limits.max_image_pixels / 1e6:.0f} megapixels: scale it down"
        )


def _reason(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def frame_indices(num_total: int, num_frames: int) -> list[int]:
    """Frames to take of a clip of `num_total`: the middles of equal segments.

    Formula: `get_index` of the model card without a bound, rounding half to even as np.round.
    Clips shorter than num_frames repeat frames.
    """
    end = num_total - 1
    segment = end / num_frames
    return [int(segment / 2 + np.round(segment * k)) for k in range(num_frames)]


def decode_video(data: bytes, what: str, *, num_frames: int, limits: Limits) -> list[Image.Image]:
    """`num_frames` RGB frames of a clip, by `frame_indices`.

    Raises InvalidVideo when it cannot be decoded, has no frame, or exceeds a limit.
    """
    import av

    if len(data) > limits.max_video_bytes:
        raise InvalidVideo(
            f"{what} has {len(data)} bytes; the limit is {limits.max_video_bytes} bytes"
        )
    try:
        total = 0
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(video=0):
                total += 1
                if total > limits.max_video_frames:
                    raise InvalidVideo(
                        f"{what} has more than {limits.max_video_frames} frames: cut it"
                    )
                if frame.width * frame.height > limits.max_image_pixels:
                    raise InvalidVideo(f"{what} has frames of {frame.width}x{frame.height} pixels")
        if total == 0:
            raise InvalidVideo(f"{what} has no video frame")
        wanted = frame_indices(total, num_frames)
        kept: dict[int, Image.Image] = {}
        with av.open(io.BytesIO(data)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    kept[index] = frame.to_image()
                if index >= wanted[-1]:
                    break
        return [kept[index] for index in wanted]
    except (av.FFmpegError, IndexError, KeyError, ValueError, OSError) as error:
        raise InvalidVideo(
            f"{what} is not a video that can be decoded: {_reason(error)}"
        ) from error


def content_digest(data: bytes, *tiling: int) -> tuple[int, int]:
    """128-bit content hash of image bytes and tiling parameters, as two uint64.

    The first is also the picture's KV-cache key, so it is never 0.
    """
    digest = hashlib.sha256(data)
    digest.update(struct.pack(f"<{len(tiling)}q", *tiling))
    first, second = struct.unpack("<QQ", digest.digest()[:16])
    return first or 1, second
