"""Workloads repeat by seed, and their pictures become the tiles they promise."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.lengths import Lengths
from benchmarks.pictures import clip, jpeg, tiled_size, unique_jpeg
from benchmarks.workload import Case, FileWorkload, GeneratedWorkload
from internvl_triton.errors import InvalidRequest
from internvl_triton.limits import Limits
from internvl_triton.media import decode_video
from internvl_triton.tiling import count_tiles


@pytest.mark.parametrize("num_tiles", [1, *range(3, 14)])
def test_sizes_become_their_tiles(num_tiles: int) -> None:
    size = tiled_size(num_tiles)
    assert count_tiles(*size, max_tiles=12, tile_size=448, use_thumbnail=True) == num_tiles


def test_unique_pictures_differ_in_bytes_and_show_the_same() -> None:
    first, fifth = unique_jpeg(64, 48, 0), unique_jpeg(64, 48, 4)
    assert first != fifth
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in (first, fifth, jpeg(64, 48, 0))]
    assert pixels[0].shape == (48, 64, 3)
    assert np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[0], pixels[2])
    other = np.asarray(Image.open(io.BytesIO(unique_jpeg(64, 48, 1))))
    assert not np.array_equal(pixels[0], other)


def test_a_clip_has_its_frames() -> None:
    frames = decode_video(clip(3, 0), "the clip", num_frames=3, limits=Limits(max_seq_len=4096))
    assert len({frame.tobytes() for frame in frames}) == 3
    assert frames[0].size == (448, 448)


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("448x448", Case("448x448", 1, (448, 448), 1)),
        ("1920x1080:3", Case("1920x1080", 3, (1920, 1080), 1)),
        ("tiles=7:0.5", Case("tiles=7", 0.5, (3 * 448, 2 * 448), 1)),
        ("2@448x448", Case("2@448x448", 1, (448, 448), 2)),
        ("video=8", Case("video=8", 1, None, 0, 8)),
        ("text", Case("text", 1)),
    ],
)
def test_cases(text: str, case: Case) -> None:
    assert Case.parse(text) == case


@pytest.mark.parametrize("text", ["", "448", "tiles=2", "tiles=14", "2@text", "0x5", "video=0"])
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Case.parse(text)


@pytest.mark.parametrize("text", ["0", "x", "9-3", "normal:5", "-4", "normal:0:1", ""])
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no distribution of lengths"):
        Lengths(text)


def test_lengths() -> None:
    random = np.random.default_rng(0)
    assert {Lengths("7").draw(random) for _ in range(5)} == {7}
    assert {Lengths("3-5").draw(random) for _ in range(100)} == {3, 4, 5}
    drawn = [Lengths("normal:64:16").draw(random) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(64, abs=1.5)
    assert np.std(drawn) == pytest.approx(16, abs=1.5)
    assert min(Lengths("normal:1:5").draw(random) for _ in range(50)) == 1


def test_a_workload_repeats_by_seed() -> None:
    mix = tuple(map(Case.parse, ("64x64:2", "2@32x32", "text", "tiles=3:0")))
    workload = GeneratedWorkload(mix, seed=3, turns=2, output_tokens=Lengths("4-9"))
    one = [workload.conversation(number) for number in range(60)]
    assert one == [workload.conversation(number) for number in range(60)]
    other = GeneratedWorkload(mix, seed=4, turns=2, output_tokens=Lengths("4-9"))
    assert one[0] != other.conversation(0)
    pictures = [image for conversation in one for image in conversation.images]
    assert len(set(pictures)) == len(pictures)
    assert {c.num_images for c in one} == {0, 1, 2}
    assert {c.num_tiles for c in one} == {0, 1, 2}
    assert all(len(c.prompts) == len(c.max_tokens) == 2 for c in one)
    assert {length for c in one for length in c.max_tokens} == set(range(4, 10))


def test_distinct_pictures_come_again() -> None:
    workload = GeneratedWorkload((Case.parse("2@32x32"),), distinct=3)
    pictures = [workload.conversation(number).images for number in range(9)]
    assert len(set(pictures)) == 3
    assert pictures[0] == pictures[3]
    assert len({image for group in pictures for image in group}) == 6


def test_files(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(448 * (number + 1), 448, number))
    (tmp_path / "notes.txt").write_text("no picture")
    workload = FileWorkload.of_directory(tmp_path, seed=1)
    first = [workload.conversation(number) for number in range(6)]
    assert len({c.images for c in first[:3]}) == len({c.images for c in first[3:]}) == 3
    assert {c.num_tiles for c in first} == {1, 3, 4}
    line = {"prompt": "What?", "images": ["0.jpg"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    (only,) = FileWorkload.of_jsonl(tmp_path / "q.jsonl").questions
    assert only == ("What?", (jpeg(448, 448, 0),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="holds no picture"):
        FileWorkload.of_directory(tmp_path / "empty")
