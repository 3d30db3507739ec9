"""Generated pictures: the tiles they promise, a photograph's cost, and no pixels seen before."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from simplejpeg import decode_jpeg

from benchmarks.pictures import clip, jpeg, media_type, tiled_size, unique_jpeg
from internvl_triton.limits import Limits
from internvl_triton.media import decode_video
from internvl_triton.tiling import count_tiles

LIMITS = Limits(max_seq_len=4096)


def pixels(file: bytes) -> NDArray[np.uint8]:
    """Raises for a file in which libjpeg sees anything odd."""
    decoded = decode_jpeg(file, "RGB", strict=True)
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(file))))
    return decoded


def frames(file: bytes) -> list[bytes]:
    with av.open(io.BytesIO(file)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


@pytest.mark.parametrize("num_tiles", [1, *range(3, 14)])
def test_sizes_become_their_tiles(num_tiles: int) -> None:
    size = tiled_size(num_tiles)
    assert count_tiles(*size, max_tiles=12, tile_size=448, use_thumbnail=True) == num_tiles


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (300, 5), (31, 417), (448, 448)])
def test_pictures_of_different_keys_have_different_pixels(size: tuple[int, int]) -> None:
    keys = [(), (0,), (0, 0), *((seed, number) for seed in range(1, 6) for number in range(20))]
    shown = [pixels(unique_jpeg(*size, *key)) for key in keys]
    assert {picture.shape for picture in shown} == {(size[1], size[0], 3)}
    assert len({picture.tobytes() for picture in shown}) == len(keys)


def test_every_tile_of_a_picture_is_its_own() -> None:
    one, other = (pixels(unique_jpeg(4 * 448, 3 * 448, 7, number)) for number in range(2))
    for y in range(0, 3 * 448, 448):
        for x in range(0, 4 * 448, 448):
            tile = (slice(y, y + 448), slice(x, x + 448))
            assert not np.array_equal(one[tile], other[tile])
    same = np.all(one == other, axis=(1, 2)).mean()
    assert 0.8 < same < 0.9  # the seven rows of blocks of eight that are not drawn again


@pytest.mark.parametrize("size", [(448, 448), (1280, 720)])
def test_a_picture_is_as_large_as_one_that_is_drawn_as_a_whole(size: tuple[int, int]) -> None:
    files = [len(unique_jpeg(*size, number)) for number in range(10)]
    assert np.mean(files) == pytest.approx(len(jpeg(*size, 0)), rel=0.2)


def test_a_clip_has_its_frames() -> None:
    taken = decode_video(clip(3, 0), "the clip", num_frames=3, limits=LIMITS)
    assert len({frame.tobytes() for frame in taken}) == 3
    assert taken[0].size == (448, 448)
    assert len(set(frames(clip(3, 0)))) == 12


def test_all_frames_of_clips_of_different_keys_differ() -> None:
    keys = [(), (0,), (0, 0), *((seed, number) for seed in (1, 2) for number in range(4))]
    seen = [frame for key in keys for frame in frames(clip(8, *key))]
    assert len(set(seen)) == len(seen) == len(keys) * 32
    assert clip(8, 1, 2) == clip(8, 1, 2)


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, kind)
    return file.getvalue()


def coded(container_format: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_media_types_of_pictures(kind: str) -> None:
    assert media_type(saved(kind)) == f"image/{kind.lower()}"


def test_media_types_of_generated_files() -> None:
    assert media_type(unique_jpeg(20, 20, 1)) == "image/jpeg"
    assert media_type(clip(1, 0)) == "video/mp4"


@pytest.mark.parametrize(
    ("container_format", "codec", "name"),
    [
        ("mp4", "libx264", "video/mp4"),
        ("webm", "libvpx", "video/webm"),
        ("matroska", "libx264", "video/x-matroska"),
    ],
)
def test_media_types_of_clips(container_format: str, codec: str, name: str) -> None:
    assert media_type(coded(container_format, codec)) == name


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0\0\0\x1cftypavif\0\0\0\0", id="AVIF"),
        pytest.param(b"RIFF\0\0\0\0AVI LIST", id="AVI"),
        pytest.param(b"<svg/>", id="SVG"),
        pytest.param(b"", id="empty"),
    ],
)
def test_other_files_have_no_media_type(data: bytes) -> None:
    assert media_type(data) == "application/octet-stream"
