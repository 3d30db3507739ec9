"""Pictures and clips: what is read, what is refused, and that refusing comes before decoding."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from internvl_triton.errors import ImageTooLarge, InvalidImage, InvalidRequest, InvalidVideo
from internvl_triton.limits import Limits
from internvl_triton.media import (
    content_digest,
    decode_image,
    decode_video,
    frame_indices,
    unwrap_data_url,
)
from tests.integration.pictures import png_header

LIMITS = Limits(max_seq_len=1024)


def encoded(kind: str, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def rgb(pixels: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """uint8 (height, width, 3) of packed pixels."""
    return pixels.view(np.uint8).reshape(*pixels.shape, 4)[:, :, :3]


def pil(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def exif_rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_people_send(kind: str) -> None:
    data = encoded(kind)
    pixels = decode_image(data, "image 1", LIMITS)
    assert pixels.shape == (40, 60)
    np.testing.assert_array_equal(rgb(pixels), pil(data))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (64, 48), (250, 131)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0", "quality": 30},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"exif": exif_rotated()},
    ],
    ids=str,
)
def test_pixels_of_a_jpeg_are_pils(
    options: dict[str, Any], size: tuple[int, int], mode: str
) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded("PNG", size))).convert(mode).save(file, "JPEG", **options)
    data = file.getvalue()
    np.testing.assert_array_equal(rgb(decode_image(data, "image 1", LIMITS)), pil(data))
    # Bytes behind the end of the picture, as cameras write them.
    np.testing.assert_array_equal(rgb(decode_image(data + b"x" * 99, "image", LIMITS)), pil(data))


def test_pil_decides_about_damaged_jpegs() -> None:
    """Where its library only warns, as for nearly every changed byte, PIL shows what it read."""
    whole = encoded("JPEG", (90, 70))
    shown = 0
    for at in range(200, len(whole), 7):
        data = whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]
        try:
            wanted = pil(data)
        except OSError:
            with pytest.raises(InvalidImage):
                decode_image(data, "image 1", LIMITS)
            continue
        shown += 1
        np.testing.assert_array_equal(rgb(decode_image(data, "image 1", LIMITS)), wanted)
    assert shown > 100


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", bytes(100)],
    ids=["empty", "text", "postscript", "zeros"],
)
def test_not_a_picture(data: bytes) -> None:
    with pytest.raises(InvalidImage, match=r"image 2 is not a picture.*JPEG, PNG"):
        decode_image(data, "image 2", LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated(kind: str, keep: float) -> None:
    data = encoded(kind, (400, 300))
    with pytest.raises(InvalidImage, match="image 1 is"):
        decode_image(data[: int(len(data) * keep)], "image 1", LIMITS)


@pytest.mark.parametrize(("side", "megapixels"), [(11_000, "121"), (40_000, "1600")])
def test_too_many_pixels_are_refused_before_decoding(side: int, megapixels: str) -> None:
    with pytest.raises(ImageTooLarge, match=f"{megapixels} megapixels; the limit is 100"):
        decode_image(png_header(side, side), "image 1", LIMITS)


def test_too_many_bytes() -> None:
    limits = replace(LIMITS, max_image_bytes=100)
    with pytest.raises(ImageTooLarge, match="bytes; the limit is 100 bytes"):
        decode_image(encoded("PNG"), "image 1", limits)


def test_data_urls() -> None:
    data = encoded("PNG")
    payload = base64.b64encode(data)
    assert unwrap_data_url(b"data:image/png;base64," + payload, "image 1") == data
    assert unwrap_data_url(b"DATA:image/png;charset=x;base64," + payload, "image 1") == data
    assert unwrap_data_url(data, "image 1") == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"data:image/png,abc", "without ';base64,'"),
        (b"data:image/png;base64,@@@@", "broken base64"),
        (b"data:image/png;base64,abc", "broken base64"),
        (b"http://example.com/a.png", "fetches nothing"),
        (b"file:///etc/passwd", "fetches nothing"),
    ],
)
def test_bad_urls(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        unwrap_data_url(data, "image 1")


def test_frame_indices_of_the_model_card() -> None:
    assert frame_indices(300, 8) == [18, 55, 93, 130, 168, 205, 242, 280]
    assert frame_indices(5, 8) == [0, 0, 1, 2, 2, 2, 3, 4]
    assert frame_indices(1, 3) == [0, 0, 0]


def clip(num_frames: int) -> bytes:
    """A lossless clip whose frame k is all gray value 10 * k."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for k in range(num_frames):
            pixels = np.full((48, 64, 3), 10 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def test_the_frames_of_the_formula_are_taken() -> None:
    frames = decode_video(clip(20), "video 1", num_frames=4, limits=LIMITS)
    values = [int(np.asarray(frame).mean() + 0.5) // 10 for frame in frames]
    assert values == frame_indices(20, 4) == [2, 7, 12, 16]


def test_bad_videos() -> None:
    for data in (b"", b"not a video", encoded("BMP")[:50], clip(5)[:300]):
        with pytest.raises(InvalidVideo, match="video 1"):
            decode_video(data, "video 1", num_frames=2, limits=LIMITS)
    with pytest.raises(InvalidVideo, match="more than 3 frames"):
        decode_video(clip(5), "video 1", num_frames=2, limits=replace(LIMITS, max_video_frames=3))
    with pytest.raises(InvalidVideo, match="the limit is 10 bytes"):
        decode_video(clip(2), "video 1", num_frames=2, limits=replace(LIMITS, max_video_bytes=10))


def test_the_digest_depends_on_bytes_and_tiling() -> None:
    digests = {content_digest(b"a", 1, 1), content_digest(b"b", 1, 1), content_digest(b"a", 2, 1)}
    assert len(digests) == 3
    assert content_digest(b"a", 1, 1) == content_digest(b"a", 1, 1)
    assert all(0 < half < 2**64 for digest in digests for half in digest)
