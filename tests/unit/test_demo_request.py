"""The service sees what the training sees; the samples are there and say what they show."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.dialogue import EXAMPLE_KINDS, Example, make_example
from demo.drawing import draw_scene
from demo.encoding import encode_example
from demo.model import demo_config
from demo.request import service_request
from demo.samples import CLIP, CONVERSATIONS, PICTURES, clip_scenes, write_clip
from demo.vocabulary import demo_vocabulary
from internvl_triton.limits import Limits
from internvl_triton.media import decode_video, frame_indices
from internvl_triton.model_spec import ModelSpec
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.tiling import choose_grid
from internvl_triton.tokenizer import Tokenizer, load_tokenizer

SAMPLES = Path(__file__).parents[2] / "demo" / "samples"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    demo_vocabulary().write_qwen2(path)
    return load_tokenizer(path)


@pytest.mark.parametrize("kind", sorted(set(EXAMPLE_KINDS) - {"crowd"}))
def test_the_service_sees_what_the_training_sees(kind: str, tokenizer: Tokenizer) -> None:
    spec = ModelSpec.from_config(demo_config(len(tokenizer)))
    preprocess = Preprocessor(spec, Limits.for_model(spec), tokenizer)
    example = make_example(random.Random(f"request {kind}"), kind, tile_size=448)
    for branch in (example.branches[0], example.branches[-1]):
        asked = service_request(example, branch)
        given = preprocess(
            Request(
                messages=asked.messages,
                images=asked.images,
                videos=asked.videos,
                sampling_parameters=json.dumps(asked.sampling_parameters),
            )
        )
        alone = Example(example.scenes, example.media, (branch,))
        row = encode_example(alone, tokenizer=tokenizer, spec=spec, bos=False)
        last = row.answers[-1]
        assert given["input_ids"][0].tolist() == row.ids[: last.begin + 1].tolist()
        assert np.array_equal(given["tiles"], row.tiles)


def test_samples_are_what_the_script_makes(tmp_path: Path) -> None:
    described = json.loads((SAMPLES / "samples.json").read_text())
    assert [entry["name"] for entry in described] == [c.name for c in CONVERSATIONS]
    for entry, conversation in zip(described, CONVERSATIONS, strict=True):
        turns = [(turn["question"], turn["answer"]) for turn in entry["turns"]]
        assert turns == list(conversation.turns)
        files = entry["images"] + ([entry["video"]] if entry["video"] else [])
        assert all((SAMPLES / file).is_file() for file in files)
    used = {name for conversation in CONVERSATIONS for name in conversation.images}
    assert used == set(PICTURES)
    assert len(PICTURES) == 10
    for name, scene in PICTURES.items():
        drawn = np.asarray(draw_scene(scene)).astype(int)
        kept = np.asarray(Image.open(SAMPLES / f"{name}.jpg")).astype(int)
        assert kept.shape == drawn.shape
        assert np.abs(kept - drawn).mean() < 1.0  # JPEG's own error


def test_sample_pictures_show_all_tilings() -> None:
    grids = {
        name: choose_grid(scene.width, scene.height, max_tiles=12, tile_size=448)
        for name, scene in PICTURES.items()
    }
    assert {(grid.columns, grid.rows) for grid in grids.values()} == {
        (1, 1), (2, 1), (1, 2), (2, 2), (3, 1),
    }  # fmt: skip


def test_no_sample_has_a_number_on_the_border_of_two_tiles() -> None:
    for scene in PICTURES.values():
        if scene.number:
            left, right = scene.number.x, scene.number.x + scene.number.width
            assert left // 448 == right // 448


def test_the_clip_moves_right(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4")
    assert CLIP == "moving-circle"
    for file in (tmp_path / "clip.mp4", SAMPLES / f"{CLIP}.mp4"):
        limits = Limits(max_seq_len=4096)
        frames = decode_video(file.read_bytes(), "the clip", num_frames=4, limits=limits)
        scenes = clip_scenes()
        for index, frame in zip(frame_indices(len(scenes), 4), frames, strict=True):
            drawn = np.asarray(draw_scene(scenes[index])).astype(int)
            assert np.abs(np.asarray(frame) - drawn).mean() < 4
