"""Whatever a caller sends is answered or refused with a typed error, and what is accepted holds."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import InvalidMessages, InvalidRequest, InvalidSampling
from internvl_triton.limits import Limits
from internvl_triton.media import packed_pixels
from internvl_triton.messages import parse_conversation
from internvl_triton.model_spec import ModelSpec
from internvl_triton.preprocessing import Preprocessor, Request, stop_rule
from internvl_triton.prompt import ImageRef, VideoRef, Visual, build_prompt
from internvl_triton.sampling import SamplingParams
from internvl_triton.tiling import choose_grid, count_tiles, tile_image
from internvl_triton.tokenizer import Tokenizer, load_tokenizer
from tests.reference import reference_ids, reference_prompt, reference_tiles

often = settings(max_examples=100, deadline=None, derandomize=True)
seldom = settings(max_examples=25, deadline=None, derandomize=True)

# What a template or a parser could trip over, among any text at all.
PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>", "<s>", "\n",
         "<box>", "</ref>", "[UNUSED_TOKEN_145]", "Image-1: ", "Frame1: ", "\u2028", "e\u0301"]
    ),
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=6).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
PARTS = st.one_of(
    st.sampled_from([{"type": "image"}, {"type": "video"}, {"type": "image_url"}]),
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    JSON,
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant"]) | JSON,
        "content": TEXTS | st.lists(PARTS, max_size=4) | JSON,
    }
)
KEYS = st.sampled_from(sorted(SamplingParams.__dataclass_fields__)) | TEXTS
VALUES = JSON | st.integers(-2, 50) | st.floats(-1, 3) | st.lists(st.integers(-1, 13), max_size=3)


@pytest.fixture(scope="module", params=["qwen2", "internlm2"])
def model(request: pytest.FixtureRequest, checkpoints: dict[str, Any]) -> tuple[Any, ...]:
    checkpoint = checkpoints[request.param]
    return checkpoint, ModelSpec.from_checkpoint(checkpoint), load_tokenizer(checkpoint)


@often
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 40), st.booleans())
def test_a_grid_is_the_nearest_that_fits(
    width: int, height: int, max_tiles: int, use_thumbnail: bool
) -> None:
    grid = choose_grid(width, height, max_tiles=max_tiles, tile_size=448)
    assert 1 <= grid.num_tiles <= max_tiles
    nearest = min(
        abs(width / height - columns / rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
    )
    assert abs(width / height - grid.columns / grid.rows) == nearest
    count = count_tiles(
        width, height, max_tiles=max_tiles, tile_size=448, use_thumbnail=use_thumbnail
    )
    assert count == grid.num_tiles + (use_thumbnail and grid.num_tiles > 1)


@seldom
@given(
    st.integers(1, 900),
    st.integers(1, 900),
    st.integers(1, 6),
    st.sampled_from(["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "F"]),
)
def test_tiles_are_the_references(width: int, height: int, max_tiles: int, mode: str) -> None:
    values = np.random.default_rng(width * height).integers(0, 255, (height, width), np.uint8)
    image = Image.fromarray(values)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    found = tile_image(packed_pixels(image), max_tiles=max_tiles, tile_size=448, use_thumbnail=True)
    np.testing.assert_array_equal(found, reference_tiles(image, max_num=max_tiles))


@often
@given(st.one_of(TEXTS, JSON.map(json.dumps), st.dictionaries(KEYS, VALUES).map(json.dumps)))
def test_sampling_parameters(text: str) -> None:
    try:
        params = SamplingParams.from_json(text)
    except InvalidSampling:
        return
    assert 0 <= params.temperature <= 100
    assert 0 < params.top_p <= 1
    assert len(params.stop) <= 4
    assert all(params.stop)
    assert 0 <= params.min_tokens <= (params.max_tokens or 2**31)
    try:
        tiles = params.tiles_per_image(3, default=12, largest=40)
    except InvalidSampling:
        return
    assert len(tiles) == 3
    assert all(1 <= limit <= 40 for limit in tiles)


@often
@given(st.lists(MESSAGES, max_size=4) | JSON, st.integers(0, 3), st.integers(0, 2))
def test_messages(messages: Any, num_images: int, num_videos: int) -> None:
    try:
        conversation = parse_conversation(
            text_input=None,
            messages=json.dumps(messages).replace("Frame1: ", "\\ud83d"),
            num_images=num_images,
            num_videos=num_videos,
        )
    except InvalidMessages:
        return
    _uses_every_medium_once(conversation.media, num_images, num_videos)
    assert conversation.turns[-1].role == "user"
    for turn in conversation.turns:
        "".join(part for part in turn.parts if isinstance(part, str)).encode()  # whole characters


@often
@given(TEXTS, st.integers(0, 3), st.integers(0, 2))
def test_questions(text: str, num_images: int, num_videos: int) -> None:
    try:
        conversation = parse_conversation(
            text_input=text, messages=None, num_images=num_images, num_videos=num_videos
        )
    except InvalidMessages:
        assert not text.strip() or "<image>" in text
        return
    _uses_every_medium_once(conversation.media, num_images, num_videos)


def _uses_every_medium_once(
    media: list[ImageRef | VideoRef], num_images: int, num_videos: int
) -> None:
    images = [
        index
        for ref in media
        if isinstance(ref, ImageRef)
        for index in range(ref.index, ref.index + ref.count)
    ]
    assert images == list(range(num_images))
    assert [ref.index for ref in media if isinstance(ref, VideoRef)] == list(range(num_videos))


SAFE = st.text(max_size=20).filter(lambda text: "<" not in text and "[UNUSED" not in text)


@seldom
@given(st.lists(st.tuples(SAFE, SAFE), max_size=2), SAFE, st.lists(st.integers(1, 3), max_size=3))
def test_prompts_are_the_references(
    model: tuple[Any, ...], history: list[tuple[str, str]], question: str, tiles: list[int]
) -> None:
    """Any text without markup, `<image>` anywhere: the ids of chat()."""
    checkpoint, spec, tokenizer = model
    history = [(asked or "?", answered or "!") for asked, answered in history]
    if not all(text.strip() for turn in history for text in turn):
        return
    question = "<image>".join([question, *("?" for _ in tiles)]) or "?"
    if not question.strip():
        return
    messages: list[dict[str, Any]] = []
    for asked, answered in history:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    parts = [{"type": "image"}] * len(tiles)
    messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
    conversation = parse_conversation(
        text_input=None, messages=json.dumps(messages), num_images=len(tiles), num_videos=0
    )
    prompt = build_prompt(
        conversation,
        [[Visual(count, (1, 0))] for count in tiles],
        tokenizer=tokenizer,
        tokens_per_tile=4,
        vocab_size=spec.llm.vocab_size,
    )
    context = tokenizer.special_id("<IMG_CONTEXT>")
    ids = [context if i >= spec.llm.vocab_size else i for i in prompt.input_ids.tolist()]
    text = reference_prompt(history, question, tiles, num_image_token=4)
    assert ids == reference_ids(checkpoint, text)


@seldom
@given(TEXTS)
def test_text_never_becomes_a_token_of_the_template(model: tuple[Any, ...], text: str) -> None:
    tokenizer: Tokenizer = model[2]
    try:
        ids = tokenizer.encode(text)
    except InvalidRequest:
        return
    special = {
        tokenizer.special_id(token)
        for token in ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
    }
    assert not special & set(ids)


def _file(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, kind)
    return file.getvalue()


FILES = [_file(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))] if draw(st.booleans()) else data)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    TEXTS,
    st.lists(broken_files() | st.binary(max_size=40), max_size=3),
    st.lists(st.binary(max_size=40), max_size=1),
    st.dictionaries(KEYS, VALUES, max_size=3).map(json.dumps),
)
def test_the_whole_step(
    model: tuple[Any, ...], text: str, images: list[bytes], videos: list[bytes], sampling: str
) -> None:
    _, spec, tokenizer = model
    request = Request(
        text_input=text, images=images, videos=videos, sampling_parameters=sampling, stream=True
    )
    try:
        tensors = Preprocessor(spec, Limits.for_model(spec), tokenizer)(request)
        stop_rule(request, tensors)
    except InvalidRequest:
        return
    ids = tensors[contract.INPUT_IDS.name]
    num_visual_tokens = int((ids >= spec.llm.vocab_size).sum())
    assert num_visual_tokens == len(tensors[contract.TILES.name]) * spec.tokens_per_tile
    assert ids.size + tensors[contract.REQUEST_OUTPUT_LEN.name].item() <= 32768
