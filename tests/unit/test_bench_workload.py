"""Workloads repeat by seed, show nothing twice, and refuse what cannot be asked."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks.lengths import Lengths
from benchmarks.pictures import jpeg
from benchmarks.workload import Case, FileWorkload, GeneratedWorkload, Seed
from internvl_triton.errors import InvalidRequest


def pixels(files: Iterable[bytes]) -> list[bytes]:
    return [np.asarray(Image.open(io.BytesIO(file))).tobytes() for file in files]


def frames(file: bytes) -> list[bytes]:
    with av.open(io.BytesIO(file)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


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


@pytest.mark.parametrize(
    "text", ["", "448", "tiles=2", "tiles=14", "2@text", "0x5", "video=0", "0@448x448"]
)
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(repr(text))):
        Case.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -5000}, "the seed is -5000; give whole numbers from 0 to 4294967295"),
        ({"seed": (0, -1)}, "the seed is (0, -1); give whole numbers from 0 to 4294967295"),
        ({"seed": 2**32}, "the seed is 4294967296; give whole numbers"),
        ({"max_tiles": 0}, "max_tiles is 0; give 1 to 40, or leave it out"),
        ({"max_tiles": -3}, "max_tiles is -3; give 1 to 40, or leave it out"),
        ({"max_tiles": 41}, "max_tiles is 41; give 1 to 40, or leave it out"),
        ({"turns": 0}, "turns is 0 and distinct 0; give at least 1 and 0"),
        ({"distinct": -1}, "turns is 1 and distinct -1; give at least 1 and 0"),
        ({"mix": (Case("text", 0.0),)}, "the mix has no case with a weight"),
        ({"mix": (Case("text", float("inf")),)}, "the mix has no case with a weight"),
    ],
)
def test_what_cannot_be_drawn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        GeneratedWorkload(**{"mix": (Case.parse("text"),), **options})


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


def test_no_pixels_come_twice_in_a_run() -> None:
    mix = tuple(map(Case.parse, ("64x48", "2@64x48", "3@64x48")))
    seeds: list[Seed] = [0, 1, 1000, *((seed, point) for seed in (0, 1, 1000) for point in (0, 1))]
    drawn = [
        image
        for seed in seeds
        for number in range(30)
        for image in GeneratedWorkload(mix, seed=seed).conversation(number).images
    ]
    assert len(drawn) > 400
    assert len(set(pixels(drawn))) == len(drawn)


def test_no_frames_come_twice_in_a_run() -> None:
    mix = (Case.parse("video=2"),)
    clips = [
        GeneratedWorkload(mix, seed=seed).conversation(number).videos[0]
        for seed in (0, 1, (0, 1), (1, 1))
        for number in range(9)
    ]
    seen = [frame for file in clips for frame in frames(file)]
    assert len(set(seen)) == len(seen) == 4 * 9 * 8
    again = GeneratedWorkload(mix, distinct=3)
    assert len({again.conversation(number).videos for number in range(9)}) == 3


def test_another_process_draws_the_same() -> None:
    program = """
import hashlib
from benchmarks.workload import Case, GeneratedWorkload
mix = tuple(map(Case.parse, ("64x48", "2@32x32", "video=1", "text")))
workload = GeneratedWorkload(mix, seed=(5, 1))
print(hashlib.sha256(repr([workload.conversation(k) for k in range(20)]).encode()).hexdigest())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) == 65


def test_files(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(448 * (number + 1), 448, number))
    (tmp_path / "notes.txt").write_text("no picture")
    workload = FileWorkload.of_directory(tmp_path, seed=(1, 2))
    first = [workload.conversation(number) for number in range(6)]
    assert len({c.images for c in first[:3]}) == len({c.images for c in first[3:]}) == 3
    assert {c.num_tiles for c in first} == {1, 3, 4}
    with pytest.raises(InvalidRequest, match="the seed is -1"):
        FileWorkload.of_directory(tmp_path, seed=-1)


def test_what_is_no_directory_of_pictures(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("no picture")
    refused = {
        tmp_path: f"{tmp_path} holds no picture; give a directory with .bmp, .gif, .jpeg, .jpg",
        tmp_path / "none": f"{tmp_path / 'none'} cannot be read: No such file or directory; give",
        file: f"{file} cannot be read: Not a directory; give a directory of pictures (.bmp",
    }
    for folder, message in refused.items():
        with pytest.raises(InvalidRequest, match=re.escape(message)):
            FileWorkload.of_directory(folder)
    file.rename(tmp_path / "a.jpg")
    message = f"{tmp_path / 'a.jpg'} is no picture that can be opened (10 bytes, which start with "
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        FileWorkload.of_directory(tmp_path)


def test_a_file_of_questions(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg(448, 448, 0))
    lines: list[dict[str, Any]] = [
        {"prompt": "What?", "images": ["0.jpg", "0.jpg"], "answer": "A square."},
        {"prompt": "One\u2028two?", "images": "0.jpg"},
        {"prompt": "Why?"},
    ]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    picture = jpeg(448, 448, 0)
    assert FileWorkload.of_jsonl(tmp_path / "q.jsonl").questions == (
        ("What?", (picture, picture)),
        ("One\u2028two?", (picture,)),
        ("Why?", ()),
    )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"prompt": "\xff"}', ["q.jsonl", "line 2", "not UTF-8", "0xff"]),
        (b'{"prompt": ', ["line 2", "not valid JSON"]),
        (b"[]", ["line 2", "list"]),
        (b'{"images": "a.jpg"}', ["line 2", "prompt"]),
        (b'{"prompt": 5}', ["line 2", "prompt", "5", "a text"]),
        (b'{"prompt": null}', ["line 2", "prompt", "null", "a text"]),
        (b'{"prompt": "a", "images": [1]}', ["line 2", "images", "[1]", "name of a file"]),
        (b'{"prompt": "a", "images": null}', ["line 2", "images", "null", "name of a file"]),
        (b'{"prompt": "a", "images": "none.jpg"}', ["line 2", "none.jpg", "No such file"]),
        (b'{"prompt": "a", "images": "a.jpg"}', ["line 2", "image 1", "is no picture", ".png"]),
        (
            b'{"prompt": "a", "sampling_parameters": {}}',
            ["line 2 has sampling_parameters;", "answer, images, prompt only"],
        ),
        (b'{"messages": [], "x": 1}', ["line 2 has messages, x;", "answer, images, prompt only"]),
    ],
)
def test_what_is_no_question(tmp_path: Path, line: bytes, named: list[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "q.jsonl").write_bytes(b'{"prompt": "What?"}\n' + line)
    with pytest.raises(InvalidRequest) as refused:
        FileWorkload.of_jsonl(tmp_path / "q.jsonl")
    assert [word for word in named if word not in str(refused.value)] == []
