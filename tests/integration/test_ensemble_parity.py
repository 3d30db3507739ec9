"""Greedy answers of the running server, token by token those of transformers in fp32."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from build.engines import build_engines
from internvl_triton.client import Answer, Client
from internvl_triton.random_checkpoint import write_random_checkpoint
from internvl_triton.tokenizer import load_tokenizer
from tests.integration.conftest import READY_TIMEOUT_S, Service, new_server, tiny_service_config
from tests.integration.pictures import clip, decoded, encoded, picture
from tests.reference import reference_ids, reference_prompt, reference_tiles

if TYPE_CHECKING:
    from tests.oracle import Oracle

pytestmark = pytest.mark.triton

MAX_TOKENS = 12
# Two fp32 implementations differ by less than 1e-3 in a logit: where the best and the second best
# token come closer than this, an answer says nothing about either, so another question is asked.
MIN_MARGIN = 0.01
QUESTIONS = (
    "What is a triangle?",
    "What is in the picture?",
    "Describe it shortly, please.",
    "Name two colors.",
    "How many circles are there?",
    "Where is the star?",
)


@dataclass(frozen=True)
class Case:
    """One request, and what the reference's `chat()` would be given for it.

    pictures: with the max_num of each, in the order of the placeholders.
    """

    prompt: str | list[dict[str, Any]]
    question: str
    history: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[Image.Image, int]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    num_tiles: int = 0

    def reference(self, checkpoint: Path) -> tuple[list[int], np.ndarray]:
        """The prompt's ids and its tiles, by the reference's formulas alone."""
        tiles = [reference_tiles(image, max_num=limit) for image, limit in self.pictures]
        text = reference_prompt(self.history, self.question, [len(part) for part in tiles])
        empty = np.empty((0, 448, 448, 3), np.uint8)
        return reference_ids(checkpoint, text), np.concatenate([empty, *tiles])


def user(text: str, images: int = 0) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def text_only(question: str) -> Case:
    return Case(question, question)


def one_tile(question: str) -> Case:
    return one_picture(question, picture(400, 400), num_tiles=1)


def thirteen_tiles(question: str) -> Case:
    return one_picture(question, picture(1600, 1200, seed=1), "JPEG", num_tiles=13)


def max_tiles_of_a_request(question: str) -> Case:
    return one_picture(question, picture(1600, 1200, seed=7), max_tiles=4, num_tiles=5)


def alpha_channel(question: str) -> Case:
    image = picture(300, 300, seed=8)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return one_picture(question, image, num_tiles=1)


def one_picture(
    question: str,
    image: Image.Image,
    kind: str = "PNG",
    *,
    num_tiles: int,
    max_tiles: int | None = None,
) -> Case:
    data = encoded(image, kind)
    return Case(
        question,
        f"<image>\n{question}",
        pictures=[(decoded(data), max_tiles or 12)],
        images=[data],
        sampling={} if max_tiles is None else {"max_tiles": max_tiles},
        num_tiles=num_tiles,
    )


def three_pictures_in_two_turns(question: str) -> Case:
    images = [picture(600, 300, seed=2), picture(300, 300, seed=3), picture(200, 210, seed=4)]
    return Case(
        [
            user("What is left of the star?", images=1),
            {"role": "assistant", "content": "A blue circle."},
            user(question, images=2),
        ],
        f"Image-2: <image>\nImage-3: <image>\n{question}",
        history=[("<image>\nWhat is left of the star?", "A blue circle.")],
        pictures=[(image, 12) for image in images],
        images=[encoded(image) for image in images],
        num_tiles=5,
    )


def explicit_placeholders(question: str) -> Case:
    images = [picture(300, 300, seed=5), picture(310, 300, seed=6)]
    prompt = f"Look at <image> and <image>. {question}"
    return Case(
        prompt,
        prompt,
        pictures=[(image, 12) for image in images],
        images=[encoded(image) for image in images],
        num_tiles=2,
    )


def video(question: str) -> Case:
    frames = [picture(160, 120, seed=seed) for seed in range(10, 21)]
    count = 4
    # `get_index` of the model card, for the whole clip
    segment = (len(frames) - 1) / count
    taken = [int(segment / 2 + np.round(segment * k)) for k in range(count)]
    labels = "".join(f"Frame{k + 1}: <image>\n" for k in range(count))
    return Case(
        question,
        labels + question,
        pictures=[(frames[index], 1) for index in taken],
        videos=[clip(frames)],
        sampling={"num_frames": count},
        num_tiles=count,
    )


CASES = (
    text_only,
    one_tile,
    thirteen_tiles,
    three_pictures_in_two_turns,
    explicit_placeholders,
    max_tiles_of_a_request,
    alpha_channel,
    video,
)


@dataclass(frozen=True)
class Decided:
    """A request, its prompt by the reference, and the oracle's answer to it."""

    request: Case
    ids: list[int]
    answer: list[int]


def decided(
    case: Callable[[str], Case],
    checkpoint: Path,
    oracle: Oracle,
    *,
    max_tokens: int = MAX_TOKENS,
    end_id: int = -1,
    accept: Callable[[list[int]], bool] = lambda answer: True,
) -> Decided:
    """The first of QUESTIONS that the oracle answers without hesitating between two tokens."""
    for question in QUESTIONS:
        request = case(question)
        ids, tiles = request.reference(checkpoint)
        assert len(tiles) == request.num_tiles
        answer, margin = oracle.greedy_with_margin(ids, tiles, max_tokens, end_id)
        if margin > MIN_MARGIN and accept(answer):
            return Decided(request, ids, answer)
    raise AssertionError("none of QUESTIONS has a clear answer: add others")


def ask(client: Client, case: Case, *, stream: bool, **sampling: Any) -> Answer:
    arguments = {"images": case.images, "videos": case.videos, **case.sampling, **sampling}
    if not stream:
        return client.generate(case.prompt, **arguments)
    answer = Answer()
    chunks = list(client.stream(case.prompt, answer=answer, **arguments))
    assert [token for chunk in chunks for token in chunk.token_ids] == answer.token_ids
    assert max(len(chunk.token_ids) for chunk in chunks) == 1, "a stream has a chunk per token"
    assert "".join(chunk.text for chunk in chunks) == answer.text
    return answer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_oracles_answer(
    service: Service, load_oracle: Callable[[Path], Oracle], case: Callable[[str], Case]
) -> None:
    expected = decided(case, service.checkpoint, load_oracle(service.checkpoint))
    for stream in (True, False):
        answer = ask(service.client, expected.request, stream=stream, max_tokens=MAX_TOKENS)
        assert answer.token_ids == expected.answer
        assert answer.num_input_tokens == len(expected.ids)
        assert answer.num_output_tokens == MAX_TOKENS
        assert answer.finish_reason == "length"


def test_the_answer_ends_at_a_stop_word(
    service: Service, load_oracle: Callable[[Path], Oracle]
) -> None:
    expected = decided(text_only, service.checkpoint, load_oracle(service.checkpoint))
    word, end = stop_word(service.checkpoint, expected.answer)
    for stream in (True, False):
        answer = ask(
            service.client,
            expected.request,
            stream=stream,
            max_tokens=MAX_TOKENS,
            stop=["never said", word],
        )
        assert answer.token_ids == expected.answer[:end]  # the stop string's own are among them
        assert not answer.text.endswith(word)
        assert answer.num_output_tokens == end
        assert answer.finish_reason == "stop"


def stop_word(checkpoint: Path, answer: list[int]) -> tuple[str, int]:
    """A text that is one token of the answer, not the first or last; the length up to there."""
    token_bytes = load_tokenizer(checkpoint).token_bytes
    bos = reference_ids(checkpoint, "")
    for token in answer[1:-1]:
        text = token_bytes.join([token]).decode(errors="replace")
        if reference_ids(checkpoint, text) == [*bos, token]:
            return text, answer.index(token) + 1
    raise AssertionError(f"no token of {answer} is a text of its own")


def test_the_answer_ends_at_the_end_of_the_turn(
    tmp_path: Path, load_oracle: Callable[[Path], Oracle]
) -> None:
    # InternLM2's config.json names another token, 2, as the end.
    checkpoint = write_random_checkpoint(tmp_path / "brief", tiny_service_config("internlm2"))
    end_id = reference_ids(checkpoint, "<|im_end|>")[-1]
    scale_row(checkpoint / "model.safetensors", "language_model.output.weight", end_id, 3.0)
    expected = decided(
        text_only,
        checkpoint,
        load_oracle(checkpoint),
        max_tokens=32,
        end_id=end_id,
        accept=lambda answer: 2 < len(answer) < 32,
    )
    build_engines(str(checkpoint), artifacts_dir=tmp_path / "artifacts", progress=False)
    with new_server(checkpoint, tmp_path / "artifacts") as server:
        server.wait_ready(READY_TIMEOUT_S)
        with Client(server.grpc_url, timeout_s=60) as client:
            for stream in (True, False):
                answer = ask(client, expected.request, stream=stream, max_tokens=32)
                assert answer.token_ids == expected.answer  # without <|im_end|>
                assert answer.num_output_tokens == len(expected.answer)
                assert answer.finish_reason == "stop"


def scale_row(file: Path, tensor: str, row: int, factor: float) -> None:
    """Multiply one row of a bfloat16 matrix in a safetensors file: that token's logit."""
    data = bytearray(file.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + header_bytes])[tensor]
    assert entry["dtype"] == "BF16"
    begin, _ = entry["data_offsets"]
    width = entry["shape"][1]
    values = np.frombuffer(
        data, ml_dtypes.bfloat16, count=width, offset=8 + header_bytes + begin + row * width * 2
    )
    values *= ml_dtypes.bfloat16(factor)
    file.write_bytes(data)
