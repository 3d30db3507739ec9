"""The model card's examples as clients/examples.py asks them: prompts, tiles and greedy ids are
those of the reference's `chat()` and `batch_chat()`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clients import examples
from clients.examples import EXAMPLES, Setting
from internvl_triton.client import Answer, Chunk, Client
from tests.integration.conftest import Service
from tests.reference import reference_frames, reference_ids, reference_prompt, reference_tiles

if TYPE_CHECKING:
    from tests.oracle import Oracle

pytestmark = pytest.mark.triton

MAX_TOKENS = 8
# Two fp32 implementations differ by less than 1e-3 in a logit.
SAME = 0.01
Picture = tuple[Image.Image, int]  # with its max_num
# A conversation: what chat() is asked, turn by turn, with the pictures at each `<image>`.
Conversation = list[tuple[str, list[list[Picture]]]]

IMAGES = [path.read_bytes() for path in examples.IMAGES]
FIRST, SECOND = ((Image.open(io.BytesIO(data)), 12) for data in IMAGES)
COMPARE: tuple[str, list[list[Picture]]] = (
    "What are the similarities and differences between these two images.",
    [],
)


def clip_of(num_frames: int) -> tuple[str, list[list[Picture]]]:
    """load_video() and the prefix of the card, for the whole clip."""
    frames = reference_frames(examples.VIDEO, num_frames)
    prefix = "".join(f"Frame{k + 1}: <image>\n" for k in range(num_frames))
    return prefix + "What is the red panda doing?", [[(frame, 1)] for frame in frames]


def card() -> dict[str, list[Conversation]]:
    """Example -> its conversations, transcribed from the card."""
    describe = "<image>\nPlease describe the image in detail."
    separate = "Image-1: <image>\nImage-2: <image>\n"
    each = "<image>\nDescribe the image in detail."
    hello = "<image>\ndescribe this image"  # batch_chat() and LMDeploy put it in front
    return {
        "pure-text": [[("Hello, who are you?", []), ("Can you tell me a story?", [])]],
        "single-image": [[("<image>\nPlease describe the image shortly.", [[FIRST]])]],
        "single-image-turns": [
            [(describe, [[FIRST]]), ("Please write a poem according to the image.", [])]
        ],
        "combined-images": [
            [("<image>\nDescribe the two images in detail.", [[FIRST, SECOND]]), COMPARE]
        ],
        "separate-images": [
            [(separate + "Describe the two images in detail.", [[FIRST], [SECOND]]), COMPARE]
        ],
        "batch": [[(each, [[FIRST]])], [(each, [[SECOND]])]],
        "video": [[clip_of(8), ("Describe this video in detail.", [])]],
        "long-video": [[clip_of(64), ("Describe this video in detail.", [])]],
        "streaming": [[(describe, [[FIRST]])]],
        "lmdeploy-hello": [[(hello, [[FIRST]])]],
        "lmdeploy-images": [[(separate + "describe these two images", [[FIRST], [SECOND]])]],
        "lmdeploy-batch": [[(hello, [[FIRST]])], [(hello, [[SECOND]])]],
        "lmdeploy-chat": [[(hello, [[FIRST]]), ("What is the woman doing?", [])]],
        "lmdeploy-service": [[(hello, [[FIRST]])]],
    }


@dataclass
class Recorder:
    """A client that notes every answer."""

    client: Client
    answers: list[tuple[tuple[bytes, ...], Answer]] = field(default_factory=list)

    def generate(self, prompt: Any, *, images: Any = (), **request: Any) -> Answer:
        answer = self.client.generate(prompt, images=images, **request)
        self.answers.append((tuple(images), answer))
        return answer

    def stream(self, prompt: Any, *, images: Any = (), **request: Any) -> Iterator[Chunk]:
        answer = Answer()
        yield from self.client.stream(prompt, images=images, answer=answer, **request)
        self.answers.append((tuple(images), answer))


@pytest.fixture(params=["qwen2", "internlm2", "demo"])
def any_service(request: pytest.FixtureRequest) -> Service:
    service: Service = request.getfixturevalue("start_service")(request.param)
    return service


def run(name: str, service: Service, **sampling: Any) -> tuple[list[str], list[Answer]]:
    """The example's texts, and the answers in the order of its conversations."""
    recorder = Recorder(service.client)
    setting = Setting(
        recorder,  # type: ignore[arg-type]
        service.server.http_url,
        images=IMAGES,
        video=examples.VIDEO.read_bytes(),
        sampling={"max_tokens": MAX_TOKENS, "min_tokens": MAX_TOKENS, **sampling},
    )
    texts = EXAMPLES[name](setting)
    if name.endswith("batch"):  # they come as they finish
        recorder.answers.sort(key=lambda answer: IMAGES.index(answer[0][0]))
    return texts, [answer for _, answer in recorder.answers]


def asked(
    checkpoint: Path, conversations: list[Conversation], answers: list[str]
) -> Iterator[tuple[list[int], NDArray[np.uint8]]]:
    """Ids and tiles of each question, by the reference's formulas alone."""
    given = iter(answers)
    for conversation in conversations:
        history: list[tuple[str, str]] = []
        num_patches_list: list[int] = []
        tiles = [np.empty((0, 448, 448, 3), np.uint8)]
        for question, places in conversation:
            for pictures in places:
                parts = [reference_tiles(image, max_num=limit) for image, limit in pictures]
                num_patches_list.append(sum(map(len, parts)))
                tiles += parts
            text = reference_prompt(history, question, num_patches_list)
            yield reference_ids(checkpoint, text), np.concatenate(tiles)
            history.append((question, next(given)))


def next_logits(
    service: Service, oracle: Oracle, ids: list[int], tiles: NDArray[np.uint8], answer: list[int]
) -> NDArray[np.float32]:
    """The oracle's logits at each place of an answer; its end does not count before min_tokens."""
    rows: NDArray[np.float32] = oracle.logits([*ids, *answer], tiles)[len(ids) - 1 : -1]
    rows[:, reference_ids(service.checkpoint, "<|im_end|>")[-1]] = -np.inf
    return rows


def lead(rows: NDArray[np.float32], answer: list[int]) -> NDArray[np.float32]:
    """By how much the oracle prefers another token at each place of an answer."""
    own = rows[np.arange(len(answer)), answer]
    second = np.sort(rows, axis=1)[:, -2]
    assert (rows.max(1) - second > SAME).mean() > 0.5, "the oracle hesitates: proves nothing"
    return np.asarray(rows.max(1) - own)


GREEDY = [name for name in EXAMPLES if name not in ("lmdeploy-chat", "lmdeploy-service")]


def test_every_example_is_transcribed() -> None:
    assert set(card()) == set(EXAMPLES)


@pytest.mark.parametrize("name", [name for name in GREEDY if name != "long-video"])
def test_answers_are_the_references(
    any_service: Service, load_oracle: Callable[[Path], Oracle], name: str
) -> None:
    texts, answers = run(name, any_service)
    assert texts == [answer.text for answer in answers]
    oracle = load_oracle(any_service.checkpoint)
    questions = list(asked(any_service.checkpoint, card()[name], texts))
    for (ids, tiles), answer in zip(questions, answers, strict=True):
        assert answer.num_input_tokens == len(ids)
        assert len(answer.token_ids) == MAX_TOKENS
        rows = next_logits(any_service, oracle, ids, tiles, answer.token_ids)
        assert lead(rows, answer.token_ids).max() < SAME


@pytest.mark.slow
def test_64_frames(qwen2: Service, load_oracle: Callable[[Path], Oracle]) -> None:
    texts, answers = run("long-video", qwen2)
    oracle = load_oracle(qwen2.checkpoint)
    oracle.model.set_attn_implementation("sdpa")  # eager attention takes 6 GB for 16,000 tokens
    try:
        questions = list(asked(qwen2.checkpoint, card()["long-video"], texts))
        for (ids, tiles), answer in zip(questions, answers, strict=True):
            assert len(tiles) == 64
            assert answer.num_input_tokens == len(ids) > 64 * 256
            rows = next_logits(qwen2, oracle, ids, tiles, answer.token_ids)
            assert lead(rows, answer.token_ids).max() < SAME
    finally:
        oracle.model.set_attn_implementation("eager")


def test_a_sampled_chat_samples_from_the_references_40_best(
    service: Service, load_oracle: Callable[[Path], Oracle]
) -> None:
    texts, answers = run("lmdeploy-chat", service)
    assert texts == run("lmdeploy-chat", service)[0]  # it has a seed
    oracle = load_oracle(service.checkpoint)
    questions = list(asked(service.checkpoint, card()["lmdeploy-chat"], texts))
    for (ids, tiles), answer in zip(questions, answers, strict=True):
        assert answer.num_input_tokens == len(ids)
        rows = next_logits(service, oracle, ids, tiles, answer.token_ids)
        fortieth = np.sort(rows, axis=1)[:, -40]
        assert (rows[np.arange(MAX_TOKENS), answer.token_ids] > fortieth - SAME).all()


def test_the_http_service_answers_as_the_client(service: Service) -> None:
    texts, _ = run("lmdeploy-service", service, seed=3)
    settings = {"max_tokens": MAX_TOKENS, "min_tokens": MAX_TOKENS, "seed": 3}
    answer = service.client.generate(
        "describe this image", images=IMAGES[:1], temperature=0.8, top_p=0.8, **settings
    )
    assert texts == [answer.text]


def test_the_program_prints_questions_and_answers(
    qwen2: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    host, port = qwen2.server.grpc_url.split(":")
    http_port = qwen2.server.http_url.split(":")[1]
    ports = [f"--host={host}", f"--grpc-port={port}", f"--http-port={http_port}"]
    assert examples.main(["pure-text", "streaming", "--max-tokens=4", *ports]) == 0
    out = capsys.readouterr().out
    assert "== pure-text\nUser: Hello, who are you?\nAssistant: " in out
    assert "== streaming\nUser: <image>\nPlease describe the image in detail.\nAssistant: " in out
    assert examples.main(["pure-text", "--image", "x", "y", *ports]) == 1
    assert "--image='x' cannot be read" in capsys.readouterr().err
