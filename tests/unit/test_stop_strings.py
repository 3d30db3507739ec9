"""Stop strings against brute force, and through the postprocessing step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_triton import tensor_contract as contract
from internvl_triton.cpu_llm import GenerationChunk, GenerationRequest
from internvl_triton.errors import InvalidRequest
from internvl_triton.llm_tensors import chunk_tensors
from internvl_triton.postprocessing import Postprocessor
from internvl_triton.stop_strings import StopRule, StopScanner
from internvl_triton.token_bytes import TokenBytes

# Few characters, so that strings overlap; of one to four bytes, some sharing their first bytes.
TEXT = st.text("ab\n你佡é🙂", max_size=24)
STOPS = st.lists(st.text("ab\n你佡é🙂", min_size=1, max_size=4), min_size=1, max_size=4)


def cut(data: bytes, ends: list[int], stops: list[str], min_tokens: int) -> tuple[bytes, int, bool]:
    """The answer by brute force: every place where a stop string could be complete, in order.

    ends: the length of the answer after each token. Returns text, number of tokens, stopped.
    """
    for end in range(1, len(data) + 1):
        token = next(number for number, stop in enumerate(ends, start=1) if end <= stop)
        complete = [stop.encode() for stop in stops if data[:end].endswith(stop.encode())]
        if complete and token >= min_tokens:
            return data[: end - max(map(len, complete))], token, True
    return data, len(ends), False


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[bytes], list[int]]:
    """Tokens that end anywhere, also inside characters, and the number of tokens of each chunk."""
    data = draw(TEXT).encode()
    borders = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    bounds = [0, *borders, len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
    return pieces, draw(st.lists(st.integers(1, 4), min_size=len(pieces), max_size=len(pieces)))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(answers(), STOPS, st.integers(0, 6), st.booleans())
def test_an_answer_is_cut_at_the_first_occurrence(
    answer: tuple[list[bytes], list[int]], stops: list[str], min_tokens: int, uses_all: bool
) -> None:
    pieces, sizes = answer
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    expected, count, stopped = cut(b"".join(pieces), ends, stops, min_tokens)

    max_tokens = len(pieces) if uses_all else 100
    scanner = StopScanner(StopRule(tuple(stops), min_tokens, max_tokens, stream=True))
    shown, num_tokens, at = b"", 0, 0
    for size in sizes:
        if at == len(pieces):
            break
        text, tokens = scanner.feed(pieces[at : at + size])
        shown, num_tokens, at = shown + text, num_tokens + tokens, at + size
        assert expected.startswith(shown), "text was shown that does not belong to the answer"
    if not uses_all:
        shown += scanner.feed([])[0]  # the model ended the answer
    assert (shown, num_tokens, scanner.stopped) == (expected, count, stopped)

    whole = StopScanner(StopRule(tuple(stops), min_tokens, 100, stream=False))
    assert (*whole.feed(pieces), whole.stopped) == (expected, count, stopped)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(answers(), STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(
    answer: tuple[list[bytes], list[int]], stops: list[str]
) -> None:
    scanner = StopScanner(StopRule(tuple(stops), 0, 100, stream=True))
    given_, shown = b"", b""
    for piece in answer[0]:
        given_, shown = given_ + piece, shown + scanner.feed([piece])[0]
        if scanner.stopped:
            return
        held = given_[len(shown) :]
        assert not held or any(stop.encode().startswith(held) for stop in stops)


TABLE = [b"", b"An", b" END", b"E", b"N", b"D", b" more", b"\xe4\xbd", b"\xa0", b"."]


REQUEST = GenerationRequest(
    request_id="",
    input_ids=np.zeros(1, np.int32),
    request_output_len=9,
    return_log_probs=True,
)


class Step:
    """The step, and what it asked to be stopped."""

    def __init__(self) -> None:
        self.stopped: list[str] = []
        self.run = Postprocessor(TokenBytes(TABLE), self.stopped.append, vocab_size=len(TABLE))

    def announce(self, request_id: str, **rule: Any) -> None:
        values = {"stop": ("END",), "min_tokens": 0, "max_tokens": 9, "stream": True} | rule
        tensors = chunk_tensors(GenerationChunk((), 0), REQUEST)
        text = StopRule(**values).to_json().encode()
        tensors[contract.STOP_RULE.name] = np.array([text], np.object_)
        self.run(tensors, request_id)

    def chunk(self, request_id: str, *ids: int, error: str = "") -> tuple[bytes, list[int], bool]:
        log_probs = tuple(-float(token) for token in ids)
        chunk = GenerationChunk(ids, 5, log_probs, error=error)
        out = self.run(chunk_tensors(chunk, REQUEST), request_id)
        assert out[contract.LOG_PROBS.name].tolist() == [-t for t in out["output_ids"].tolist()]
        assert out[contract.NUM_OUTPUT_TOKENS.name].item() == len(out["output_ids"])
        return (
            out[contract.TEXT_OUTPUT.name][0],
            out["output_ids"].tolist(),
            bool(out[contract.STOPPED.name].item()),
        )


def test_a_stop_string_over_three_tokens_ends_the_answer_and_the_generation() -> None:
    step = Step()
    step.announce("a")
    assert step.chunk("a", 1) == (b"An", [1], False)
    assert step.chunk("a", 3) == (b"", [3], False)
    assert step.chunk("a", 4) == (b"", [4], False)
    assert step.stopped == []
    assert step.chunk("a", 5) == (b"", [5], True)
    assert step.stopped == ["a"]
    assert step.chunk("a", 6) == (b"", [], True)  # made before the stop arrived
    assert step.chunk("a") == (b"", [], True)
    assert step.stopped == ["a"]
    assert step.chunk("a", 6) == (b" more", [6], False)  # the id is free again


def test_held_back_text_is_shown_when_it_is_no_stop_string_after_all() -> None:
    step = Step()
    step.announce("a")
    assert step.chunk("a", 3) == (b"", [3], False)
    assert step.chunk("a", 9) == (b"E.", [9], False)
    assert step.chunk("a", 3) == (b"", [3], False)
    assert step.chunk("a") == (b"E", [], False)  # the model ended the answer
    step.announce("a", max_tokens=2)
    assert step.chunk("a", 3) == (b"", [3], False)
    assert step.chunk("a", 4) == (b"EN", [4], False)  # max_tokens ended it
    step.announce("a", stream=False)
    assert step.chunk("a", 3, 4) == (b"EN", [3, 4], False)


def test_one_whole_answer_is_cut_too() -> None:
    step = Step()
    step.announce("a", stream=False)
    assert step.chunk("a", 1, 2, 6) == (b"An ", [1, 2], True)
    assert step.stopped == []  # it has ended anyway


def test_requests_do_not_see_each_others_stop_strings() -> None:
    step = Step()
    step.announce("a")
    step.announce("b", stop=("A",))
    assert step.chunk("b", 1) == (b"", [1], True)
    assert step.chunk("", 2) == (b" END", [2], False)
    assert step.chunk("a", 1) == (b"An", [1], False)


def test_a_stop_string_inside_the_bytes_of_a_character() -> None:
    step = Step()
    step.announce("a", stop=("你",))
    assert step.chunk("a", 1, 7) == (b"An", [1, 7], False)  # e4 bd: may become 你 (e4 bd a0)
    assert step.chunk("a", 8) == (b"", [8], True)


def test_an_id_in_use_is_refused_and_the_other_request_goes_on() -> None:
    step = Step()
    step.announce("a")
    step.announce("a")  # nothing has been answered: the first may be long gone
    assert step.chunk("a", error="request id 'a' is in use") == (b"", [], False)
    assert step.chunk("a", 3) == (b"", [3], False)
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        step.announce("a")
    assert step.chunk("a", error="the engine failed") == (b"E", [], False)
    step.announce("a")


def test_a_brief_response_has_only_what_there_is_to_tell() -> None:
    """`tensor_contract.BRIEF`: counted against all outputs of the same step."""
    quiet = GenerationRequest(request_id="", input_ids=np.zeros(1, np.int32), request_output_len=9)

    def outputs(chunk: GenerationChunk, request: GenerationRequest = quiet) -> dict[str, Any]:
        step = Step()
        tensors = chunk_tensors(chunk, request)
        step.announce("full")
        step.announce("brief")
        everything = step.run(tensors, "full")
        assert set(everything) == {tensor.name for tensor in contract.POSTPROCESSING.outputs}
        brief = step.run(tensors, "brief", brief=True)
        for name, value in brief.items():
            np.testing.assert_array_equal(value, everything[name])
        return brief

    least = {"text_output", "output_ids", "num_input_tokens"}
    assert set(outputs(GenerationChunk((1,), 5))) == least
    assert set(outputs(GenerationChunk((2,), 5))) == least | {"stopped"}
    assert set(outputs(GenerationChunk((), 5, error="failed"))) == least | {"error"}
    assert set(outputs(GenerationChunk((1,), 5, (-1.0,)), REQUEST)) == least | {"log_probs"}


def test_brief_responses_tell_the_prompts_length_once() -> None:
    quiet = GenerationRequest(request_id="", input_ids=np.zeros(1, np.int32), request_output_len=9)
    tensors = chunk_tensors(GenerationChunk((1,), 5), quiet)
    step = Step()

    def told(request_id: str, *, brief: bool = True) -> bool:
        return "num_input_tokens" in step.run(tensors, request_id, brief=brief)

    assert [told("a"), told("b"), told("a"), told("b")] == [True, True, False, False]
    assert told("a", brief=False)
    assert [told(""), told("")] == [True, True]  # nobody knows which request it is
    step.announce("a")  # another request with an id that was used before
    assert [told("a"), told("a")] == [True, False]
