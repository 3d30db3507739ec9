"""In-flight batching with a scripted model, and with a real one against running alone."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import export_llm
from internvl_triton.cpu_llm import CpuLlmEngine, GenerationChunk, GenerationRequest
from internvl_triton.cpu_llm.generation import EngineLimits, validate_request
from internvl_triton.cpu_llm.kv_cache import KvCache
from internvl_triton.cpu_llm.scheduler import MAX_EARLY_STOPS, Scheduler
from internvl_triton.cpu_llm.transformer import Segment
from internvl_triton.errors import InvalidRequest, InvalidSampling, RequestTooLong
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

VOCAB = 1000
PATIENCE_S = 20.0


class CountingModel:
    """Continues 5 with 6, 7, 8, ...; fails on the token 666.

    With `hold`, every step waits until the test grants it one.
    """

    vocab_size = VOCAB
    hidden_size = 4

    def __init__(self, *, hold: bool = False) -> None:
        self.steps: list[list[list[int]]] = []  # the token ids of each segment of each step
        self._hold = hold
        self._granted = threading.Semaphore(0)
        self._began = threading.Semaphore(0)

    def grant(self, steps: int) -> None:
        for _ in range(steps):
            self._granted.release()

    def wait_for_step(self) -> None:
        """Return when the next step has begun (and, with `hold`, waits)."""
        assert self._began.acquire(timeout=PATIENCE_S)

    def new_caches(self) -> list[KvCache]:
        return []

    def forward(self, segments: Sequence[Segment]) -> np.ndarray:
        ids = [segment.token_ids.tolist() for segment in segments]
        self.steps.append(ids)
        self._began.release()
        if self._hold:
            assert self._granted.acquire(timeout=PATIENCE_S)
        if any(666 in segment for segment in ids):
            raise RuntimeError("a secret of the server")
        rows = [token for segment in ids for token in segment]
        return np.array([[token] * 4 for token in rows], np.float32)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(hidden), VOCAB), np.float32)
        following = (hidden[:, 0].astype(int) + 1) % VOCAB
        logits[np.arange(len(hidden)), following] = 10
        return logits


class Answer:
    """Collects the chunks of one request and insists on exactly one final chunk, the last."""

    def __init__(self) -> None:
        self.chunks: list[GenerationChunk] = []
        self._final = threading.Event()

    def __call__(self, chunk: GenerationChunk) -> None:
        assert not self._final.is_set(), "a chunk after the final one"
        self.chunks.append(chunk)
        if chunk.final:
            self._final.set()

    @property
    def ended(self) -> bool:
        return self._final.is_set()

    def wait(self) -> "Answer":
        assert self._final.wait(PATIENCE_S), "no final chunk"
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.new_token_ids]

    @property
    def error(self) -> str:
        return self.chunks[-1].error


def request(prompt: Sequence[int], output_len: int = 3, **changes: Any) -> GenerationRequest:
    return GenerationRequest(
        **{
            "request_id": "",
            "input_ids": np.array(prompt, np.int32),
            "request_output_len": output_len,
            **changes,
        }
    )


@pytest.fixture
def engines() -> Iterator[list[Scheduler]]:
    started: list[Scheduler] = []
    yield started
    for engine in started:
        if isinstance(engine.model, CountingModel):
            engine.model.grant(10**4)
        engine.close()


def start(engines: list[Scheduler], model: CountingModel | None = None, **limits: int) -> Scheduler:
    engine = Scheduler(
        model or CountingModel(),
        **{
            "max_batch_size": 4,
            "max_seq_len": 2000,
            "max_visual_tokens": 8,
            "max_queue_size": 8,
            **limits,
        },
    )
    engines.append(engine)
    return engine


def ask(engine: Scheduler, asked: GenerationRequest) -> Answer:
    answer = Answer()
    engine.submit(asked, answer)
    return answer


# --- one request --------------------------------------------------------------------------------


def test_whole_answer_in_one_chunk(engines: list[Scheduler]) -> None:
    answer = ask(start(engines), request([1, 2, 5], 4)).wait()
    (chunk,) = answer.chunks
    assert chunk == GenerationChunk(
        new_token_ids=(6, 7, 8, 9), num_input_tokens=3, log_probs=(), final=True, error=""
    )
    assert chunk.num_output_tokens == 4


def test_streaming_sends_one_token_a_step_and_the_last_one_in_the_final_chunk(
    engines: list[Scheduler],
) -> None:
    answer = ask(start(engines), request([5], 3, streaming=True)).wait()
    assert [(chunk.new_token_ids, chunk.final) for chunk in answer.chunks] == [
        ((6,), False),
        ((7,), False),
        ((8,), True),
    ]
    assert [chunk.num_output_tokens for chunk in answer.chunks] == [1, 1, 1]
    assert [chunk.num_input_tokens for chunk in answer.chunks] == [1, 1, 1]


@pytest.mark.parametrize("streaming", [True, False])
def test_end_id_is_not_part_of_the_answer(engines: list[Scheduler], streaming: bool) -> None:
    answer = ask(start(engines), request([5], 100, end_id=8, streaming=streaming)).wait()
    assert answer.tokens == [6, 7]
    if streaming:
        assert answer.chunks[-1].new_token_ids == ()


def test_end_id_first_gives_an_empty_answer(engines: list[Scheduler]) -> None:
    answer = ask(start(engines), request([5], 100, end_id=6)).wait()
    assert [(chunk.new_token_ids, chunk.error) for chunk in answer.chunks] == [((), "")]


def test_without_end_id_only_the_length_ends_the_answer(engines: list[Scheduler]) -> None:
    answer = ask(start(engines), request([VOCAB - 2], 50)).wait()
    assert answer.tokens == [VOCAB - 1, *range(49)]


@pytest.mark.parametrize(
    ("stop_words", "expected"),
    [
        (((8,),), [6, 7, 8]),
        (((7, 8),), [6, 7, 8]),
        (((8, 7), (9,)), [6, 7, 8, 9]),
        (((5, 6),), [6]),  # 0.21 compares with the end of the prompt, too
        (((3, 4, 5, 6, 7),), [6, 7]),
        (((1, 2, 3, 4, 5, 6),), [6, 7, 8, 9, 10]),  # longer than prompt and answer at that point
        (((4, 5),), [6, 7, 8, 9, 10]),  # prompt alone: no token of the answer ends it
    ],
    ids=str,
)
def test_stop_words_end_the_answer_and_are_part_of_it(
    engines: list[Scheduler], stop_words: tuple[tuple[int, ...], ...], expected: list[int]
) -> None:
    assert ask(start(engines), request([3, 4, 5], 5, stop_words=stop_words)).wait().tokens == (
        expected
    )


def test_min_tokens_postpones_end_id(engines: list[Scheduler]) -> None:
    answer = ask(start(engines), request([5], 100, end_id=8, min_tokens=4)).wait()
    # 8 is masked as the third token; the runner-up among zeros is the lowest id, 0
    assert answer.tokens == [6, 7, 0, 1, 2, 3, 4, 5, 6, 7]


def test_log_probs_are_those_of_the_answer_so_far(engines: list[Scheduler]) -> None:
    answer = ask(start(engines), request([5], 3, streaming=True, return_log_probs=True)).wait()
    expected = float(10 - np.log(np.exp(10) + VOCAB - 1))
    assert [len(chunk.log_probs) for chunk in answer.chunks] == [1, 2, 3]
    assert answer.chunks[-1].log_probs == pytest.approx([expected] * 3)


def test_a_long_prompt_is_fed_in_pieces(engines: list[Scheduler]) -> None:
    model = CountingModel()
    prompt = [n % 500 for n in range(1300)]
    answer = ask(start(engines, model), request(prompt, 2)).wait()
    assert [len(segment) for step in model.steps for segment in step] == [512, 512, 276, 1]
    assert answer.tokens == [300, 301]


# --- many requests ------------------------------------------------------------------------------


def test_requests_join_and_leave_between_steps(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model)
    first = ask(engine, request([100], 5))
    model.wait_for_step()
    second = ask(engine, request([200], 2))
    model.grant(100)
    first.wait()
    second.wait()
    assert model.steps == [
        [[100]],
        [[101], [200]],  # joined
        [[102], [201]],
        [[103]],  # left
        [[104]],
    ]
    assert first.tokens == [101, 102, 103, 104, 105]
    assert second.tokens == [201, 202]


def test_a_long_prompt_does_not_stall_the_others(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model)
    short = ask(engine, request([100], 4))
    model.wait_for_step()
    long = ask(engine, request([7] * 1100, 1))
    model.grant(100)
    short.wait()
    long.wait()
    sizes = [[len(segment) for segment in step] for step in model.steps]
    assert sizes == [[1], [1, 512], [1, 512], [1, 76]]


def test_the_queue_is_first_in_first_out(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model, max_batch_size=1)
    order: list[int] = []
    answers = []
    for number in range(4):
        answer = Answer()

        def collect(chunk: GenerationChunk, answer: Answer = answer, number: int = number) -> None:
            order.append(number)
            answer(chunk)

        engine.submit(request([number * 10], 2), collect)
        answers.append(answer)
    model.grant(100)
    for answer in answers:
        answer.wait()
    assert order == [0, 1, 2, 3]
    assert max(len(step) for step in model.steps) == 1


def test_overload_is_refused_with_the_numbers(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model, max_batch_size=1, max_queue_size=2)
    accepted = [ask(engine, request([1])) for _ in range(3)]
    model.wait_for_step()
    refused = ask(engine, request([1]))
    assert refused.ended
    assert refused.error == (
        "overloaded: 1 requests are running (max_batch_size 1) and 2 are waiting "
        "(max_queue_size 2); try again later"
    )
    model.grant(100)
    assert all(answer.wait().error == "" for answer in accepted)


def test_stats(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model, max_batch_size=1)
    answers = [ask(engine, request([1, 2], 3)) for _ in range(2)]
    model.wait_for_step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    model.grant(100)
    for answer in answers:
        answer.wait()
    ask(engine, request([])).wait()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.finished, stats.failed) == (0, 0, 2, 1)
    assert (stats.prompt_tokens, stats.generated_tokens) == (4, 6)


# --- stop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_stop_while_generating(engines: list[Scheduler], streaming: bool) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model)
    answer = ask(engine, request([5], 1000, request_id="a", streaming=streaming))
    other = ask(engine, request([50], 6, request_id="b"))
    for _ in range(3):
        model.wait_for_step()
        model.grant(1)
    model.wait_for_step()
    engine.stop("a")
    model.grant(1)
    answer.wait()
    assert answer.error == ""
    assert answer.tokens == [6, 7, 8, 9]  # what the running step finished is kept
    assert (answer.chunks[-1].new_token_ids == ()) is streaming
    model.grant(100)
    assert other.wait().tokens == [51, 52, 53, 54, 55, 56]
    assert [9] not in model.steps[-1]


def test_stop_in_the_middle_of_a_prompt(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model)
    answer = ask(engine, request([5] * 1900, 5, request_id="a"))
    model.wait_for_step()
    engine.stop("a")
    model.grant(100)
    assert answer.wait().tokens == []
    assert answer.error == ""
    assert len(model.steps) == 1


def test_stop_in_the_queue(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model, max_batch_size=1)
    running = ask(engine, request([5], 3))
    model.wait_for_step()
    queued = ask(engine, request([50], 3, request_id="a"))
    engine.stop("a")
    model.grant(1)
    assert queued.wait().tokens == []
    assert not running.ended
    model.grant(100)
    assert running.wait().tokens == [6, 7, 8]


def test_stop_before_its_request(engines: list[Scheduler]) -> None:
    engine = start(engines)
    engine.stop("a")
    answer = ask(engine, request([5], 3, request_id="a"))
    assert answer.ended
    assert (answer.tokens, answer.error) == ([], "")
    assert ask(engine, request([5], 3, request_id="a")).wait().tokens == [6, 7, 8]  # once


def test_an_early_stop_is_forgotten(
    engines: list[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_triton.cpu_llm.scheduler.EARLY_STOP_SECONDS", -1.0)
    engine = start(engines)
    engine.stop("a")
    assert ask(engine, request([5], 1, request_id="a")).wait().tokens == [6]


def test_early_stops_are_bounded(engines: list[Scheduler]) -> None:
    engine = start(engines)
    for number in range(MAX_EARLY_STOPS + 1):
        engine.stop(str(number))
    assert ask(engine, request([5], 1, request_id="0")).wait().tokens == [6]
    assert ask(engine, request([5], 1, request_id="1")).wait().tokens == []


def test_stop_of_nothing_is_no_error(engines: list[Scheduler]) -> None:
    engine = start(engines)
    done = ask(engine, request([5], 1, request_id="a")).wait()
    engine.stop("a")
    engine.stop("")
    assert done.tokens == [6]
    assert ask(engine, request([5], 1, request_id="")).wait().tokens == [6]


def test_a_cancelled_caller_frees_its_place(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model, max_batch_size=1)
    gone = threading.Event()
    left = ask(engine, request([5], 1000, is_cancelled=gone.is_set))
    model.wait_for_step()
    waiting = ask(engine, request([50], 2))
    gone.set()
    model.grant(100)
    assert left.wait().tokens == [6]
    assert waiting.wait().tokens == [51, 52]


# --- failures -----------------------------------------------------------------------------------


def test_an_exception_in_the_model_ends_the_step_not_the_engine(
    engines: list[Scheduler], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(engines)
    failed = ask(engine, request([666])).wait()
    assert failed.error == (
        "the language model engine failed on this request; the server's log says why"
    )
    assert "secret" in caplog.text
    assert ask(engine, request([5])).wait().tokens == [6, 7, 8]


def test_a_model_that_breaks_its_contract(engines: list[Scheduler]) -> None:
    model = CountingModel()
    model.logits = lambda hidden: np.zeros((7, VOCAB), np.float32)  # type: ignore[method-assign]
    engine = start(engines, model)
    assert "engine failed" in ask(engine, request([5])).wait().error
    assert "engine failed" in ask(engine, request([5])).wait().error


def test_nan_logits(engines: list[Scheduler]) -> None:
    model = CountingModel()
    model.logits = lambda hidden: np.full((len(hidden), VOCAB), np.nan, np.float32)  # type: ignore[method-assign]
    assert ask(start(engines, model), request([5])).wait().error == (
        "the model produced the logit nan"
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_an_exception_in_on_chunk_ends_only_its_request(
    engines: list[Scheduler], streaming: bool
) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model)
    chunks: list[GenerationChunk] = []

    def fail(chunk: GenerationChunk) -> None:
        chunks.append(chunk)
        raise ConnectionError("the client is gone")

    engine.submit(request([5], 3, streaming=streaming), fail)
    other = ask(engine, request([50], 5))
    model.grant(100)
    assert other.wait().tokens == [51, 52, 53, 54, 55]
    assert [chunk.final for chunk in chunks] == ([False, True] if streaming else [True])


def test_an_exception_in_is_cancelled(engines: list[Scheduler]) -> None:
    def fail() -> bool:
        raise RuntimeError("no such request")

    engine = start(engines)
    assert "engine failed" in ask(engine, request([5], is_cancelled=fail)).wait().error
    assert ask(engine, request([5])).wait().tokens == [6, 7, 8]


def test_close_ends_every_request(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model, max_batch_size=1)
    running, waiting = ask(engine, request([5], 1000)), ask(engine, request([5], 1000))
    model.wait_for_step()
    closer = threading.Thread(target=engine.close)
    closer.start()
    model.grant(10**4)
    closer.join(PATIENCE_S)
    late = ask(engine, request([5]))
    for answer in (running, waiting, late):
        assert answer.wait().error == (
            "the language model engine was shut down before this request was finished"
        )
    engine.close()


def test_close_from_on_chunk(engines: list[Scheduler]) -> None:
    engine = start(engines)
    answer = Answer()

    def close_and_collect(chunk: GenerationChunk) -> None:
        engine.close()
        answer(chunk)

    engine.submit(request([5], 1000, streaming=True), close_and_collect)
    answer.wait()
    assert "shut down" in answer.error


def test_a_request_id_in_use(engines: list[Scheduler]) -> None:
    model = CountingModel(hold=True)
    engine = start(engines, model)
    first = ask(engine, request([5], 2, request_id="a"))
    second = ask(engine, request([5], 2, request_id="a"))
    assert second.error == "request id 'a' is in use by a request that has not finished"
    model.grant(100)
    assert first.wait().tokens == [6, 7]
    assert ask(engine, request([5], 2, request_id="a")).wait().tokens == [6, 7]


def test_a_finished_id_can_be_used_again_from_its_final_chunk(engines: list[Scheduler]) -> None:
    engine = start(engines)
    again = Answer()

    def resubmit(chunk: GenerationChunk) -> None:
        engine.submit(request([50], 1, request_id="a"), again)

    engine.submit(request([5], 1, request_id="a"), resubmit)
    assert again.wait().tokens == [51]


# --- validation ---------------------------------------------------------------------------------

LIMITS = EngineLimits(vocab_size=VOCAB, hidden_size=4, max_seq_len=100, max_visual_tokens=8)


def table(rows: int) -> np.ndarray:
    return np.zeros((rows, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": []}, InvalidRequest, r"input_ids has shape \(0,\); give a prompt of at least"),
        ({"output_len": 0}, InvalidRequest, "request_output_len is 0; give at least 1"),
        (
            {"prompt": [1] * 60, "output_len": 41},
            RequestTooLong,
            r"prompt of 60 tokens \+ request_output_len 41 = 101 exceeds max_seq_len 100",
        ),
        (
            {"prompt_embedding_table": table(9)},
            RequestTooLong,
            "9 visual tokens exceed the engine's limit of 8",
        ),
        ({"prompt": [-1]}, InvalidRequest, "input_ids holds -1; token ids start at 0"),
        (
            {"prompt": [1000], "prompt_embedding_table": None},
            InvalidRequest,
            "virtual token id 1000 selects row 0 of prompt_embedding_table, which has 0 rows",
        ),
        (
            {"prompt": [1003], "prompt_embedding_table": table(3)},
            InvalidRequest,
            "virtual token id 1003 selects row 3 .*has 3 rows",
        ),
        (
            {"prompt_embedding_table": np.zeros((2, 5), np.float32)},
            InvalidRequest,
            r"has shape \(2, 5\); expected \[num_visual_tokens, 4\]",
        ),
        (
            {"prompt_table_extra_ids": np.zeros(2, np.uint64)},
            InvalidRequest,
            r"prompt_table_extra_ids has shape \(2,\), input_ids \(1,\)",
        ),
        ({"end_id": VOCAB}, InvalidRequest, r"end_id is 1000; allowed: -1 \(none\) to 999"),
        ({"stop_words": ((1,), ())}, InvalidRequest, "a stop word has no tokens"),
        ({"temperature": float("nan")}, InvalidSampling, "temperature is nan; allowed: >= 0"),
        ({"temperature": -1.0}, InvalidSampling, r"temperature is -1\.0"),
        ({"temperature": float("inf")}, InvalidSampling, "temperature is inf"),
        ({"top_k": -1}, InvalidSampling, "top_k is -1"),
        ({"top_p": 1.5}, InvalidSampling, r"top_p is 1\.5; allowed: <= 1"),
        ({"top_p": float("nan")}, InvalidSampling, "top_p is nan"),
        ({"seed": 2**64}, InvalidSampling, "seed is 18446744073709551616"),
        ({"repetition_penalty": 0.0}, InvalidSampling, r"repetition_penalty is 0\.0; allowed: > 0"),
        ({"presence_penalty": float("nan")}, InvalidSampling, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, InvalidSampling, "frequency_penalty is inf"),
        ({"min_tokens": -1}, InvalidSampling, "min_tokens is -1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_requests(
    engines: list[Scheduler], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    asked = request(**{"prompt": [1], "output_len": 1, **changes})
    with pytest.raises(error, match=message) as raised:
        validate_request(asked, LIMITS)
    answer = ask(start(engines, max_seq_len=100), asked)
    assert answer.ended
    assert answer.error == str(raised.value)


def test_requests_at_the_limits_are_accepted() -> None:
    validate_request(
        request(
            [1000, 1007, *[1] * 58],
            40,
            prompt_embedding_table=table(8),
            end_id=VOCAB - 1,
            top_p=1.0,
            seed=2**64 - 1,
        ),
        LIMITS,
    )
    # a text-only request of the ensemble brings one dummy row, whatever the limit
    validate_request(
        request([1], prompt_embedding_table=table(1)), replace(LIMITS, max_visual_tokens=0)
    )


# --- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    source = write_random_checkpoint(
        root / "source", tiny_config("qwen2", "300m"), seed=3, tokenizer=False
    )
    return export_llm(source, root / "tp2", tp_size=2, progress=False)


def mixed_requests() -> list[GenerationRequest]:
    random = np.random.default_rng(0)
    features = random.standard_normal((256, 256)).astype(np.float32)
    picture = np.concatenate(
        [random.integers(3, 1283, 9), np.arange(1283, 1283 + 256), random.integers(3, 1283, 9)]
    )
    texts = [random.integers(3, 1283, n).astype(np.int32) for n in (3, 40, 700)]
    return [
        request(texts[0].tolist(), 12),
        request(picture.tolist(), 10, prompt_embedding_table=features),
        request(texts[1].tolist(), 9, temperature=0.8, top_k=50, top_p=0.9, seed=11),
        request(texts[2].tolist(), 5, streaming=True, repetition_penalty=1.3),
        request(texts[1].tolist(), 20, temperature=1.5, top_p=1.0, seed=12, return_log_probs=True),
        request(texts[0].tolist(), 12, presence_penalty=2.0, frequency_penalty=0.5),
    ]


def test_an_answer_does_not_depend_on_the_batch(checkpoint: Path) -> None:
    engine = CpuLlmEngine(
        checkpoint, max_batch_size=4, max_seq_len=2048, max_visual_tokens=256, max_queue_size=8
    )
    try:
        alone = [ask(engine, asked).wait() for asked in mixed_requests()]
        together = [ask(engine, asked) for asked in mixed_requests()]
        for one, many in zip(alone, together, strict=True):
            assert many.wait().error == ""
            assert many.tokens == one.tokens
            assert many.chunks[-1].log_probs == pytest.approx(one.chunks[-1].log_probs, abs=1e-3)
        # the prompt, with its virtual ids, never comes back
        assert all(token < 1283 for answer in alone for token in answer.tokens)
        assert [len(answer.tokens) for answer in alone] == [12, 10, 9, 5, 20, 12]
    finally:
        engine.close()


def test_a_seed_gives_the_same_answer_alone_and_amid_16_others(checkpoint: Path) -> None:
    random = np.random.default_rng(6)
    prompt = random.integers(3, 1283, 20).tolist()
    sampled = {"temperature": 1.2, "top_p": 0.95, "seed": 2**63 + 7}
    others = [
        request(random.integers(3, 1283, 5 + 9 * n).tolist(), 5 + n, temperature=1.0, seed=n)
        for n in range(16)
    ]
    engine = CpuLlmEngine(
        checkpoint, max_batch_size=17, max_seq_len=2048, max_visual_tokens=8, max_queue_size=8
    )
    try:
        alone = ask(engine, request(prompt, 20, **sampled)).wait()
        again = ask(engine, request(prompt, 20, **sampled)).wait()
        crowd = [ask(engine, other) for other in others[:8]]
        amid = ask(engine, request(prompt, 20, **sampled))
        crowd += [ask(engine, other) for other in others[8:]]
        another_seed = ask(engine, request(prompt, 20, **{**sampled, "seed": 8})).wait()
        for answer in (*crowd, amid):
            answer.wait()
    finally:
        engine.close()
    assert len(alone.tokens) == 20
    assert amid.tokens == again.tokens == alone.tokens
    assert another_seed.tokens != alone.tokens


def test_generation_logits_are_those_of_the_new_tokens(checkpoint: Path) -> None:
    engine = CpuLlmEngine(
        checkpoint, max_batch_size=4, max_seq_len=2048, max_visual_tokens=8, max_queue_size=8
    )
    asked = {"return_generation_logits": True, "return_log_probs": True}
    try:
        whole = ask(engine, request([5, 6, 7], 6, **asked)).wait()
        streamed = ask(engine, request([5, 6, 7], 6, streaming=True, **asked)).wait()
        without = ask(engine, request([5, 6, 7], 6)).wait()
    finally:
        engine.close()
    logits = whole.chunks[-1].generation_logits
    assert logits is not None
    assert logits.shape == (6, 1283)
    assert logits.argmax(axis=1).tolist() == whole.tokens  # greedy
    norm = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    chosen = logits[range(6), whole.tokens] - norm
    assert whole.chunks[-1].log_probs == pytest.approx(chosen.tolist(), abs=1e-5)
    pieces = [chunk.generation_logits for chunk in streamed.chunks]
    assert [piece.shape for piece in pieces if piece is not None] == [(1, 1283)] * 6
    np.testing.assert_allclose(
        np.concatenate([piece for piece in pieces if piece is not None]), logits, atol=1e-5
    )
    assert all(chunk.generation_logits is None for chunk in without.chunks)
