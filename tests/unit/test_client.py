"""The client against a scripted transport: text, usage, ends, deadlines, errors."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import numpy as np
import pytest

from internvl_triton.answer import Answer, AnswerText
from internvl_triton.client import (
    AsyncClient,
    Client,
    RequestCost,
    request_tensors,
)
from internvl_triton.errors import (
    InvalidRequest,
    RequestFailed,
    RequestTimedOut,
    ServerUnavailable,
)
from internvl_triton.fake_transport import FakeTransport, fake_response
from internvl_triton.grpc_transport import _translated


def ask(script, **sampling) -> tuple[list[str], Answer, FakeTransport]:
    transport = FakeTransport(script)
    answer = Answer()
    with Client(transport=transport) as client:
        chunks = client.stream("Hi", answer=answer, **sampling)
        texts = [chunk.text for chunk in chunks]
    return texts, answer, transport


def test_an_answer() -> None:
    texts, answer, transport = ask(
        [
            fake_response(b" A red", [5, 6], log_probs=[-0.1, -0.2]),
            fake_response(b" circle. ", [7]),
        ],
        logprobs=True,
    )
    assert texts == ["A red", " circle."]
    assert answer.text == "A red circle."
    assert answer.token_ids == [5, 6, 7]
    assert answer.log_probs == pytest.approx([-0.1, -0.2])
    assert (answer.num_input_tokens, answer.num_output_tokens) == (10, 3)
    assert answer.finish_reason == "stop"
    assert answer.ttft_s is not None
    assert 0 <= answer.ttft_s <= answer.latency_s
    assert transport.stopped == []
    assert transport.closed_streams == 1


@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        ({}, set()),
        ({"logprobs": True}, {"log_probs"}),
        (
            {"logprobs": True, "top_logprobs": 2},
            {"log_probs", "top_token_ids", "top_log_probs"},
        ),
    ],
)
def test_only_what_is_read_is_asked_for(sampling: dict[str, Any], more: set[str]) -> None:
    always = {"text_output", "output_ids", "num_input_tokens", "stopped", "error"}
    _, _, transport = ask([fake_response(b"a", [1])], **sampling)
    assert [set(names) for names in transport.outputs] == [always | more]


@pytest.mark.parametrize("cuts", list(itertools.combinations(range(1, 12), 3)))
def test_every_way_to_cut_an_answer_gives_the_same_text(cuts: tuple[int, ...]) -> None:
    data = " \né 你好🙂 b \n".encode()
    bounds = [0, *(cut * len(data) // 12 for cut in cuts), len(data)]
    text = AnswerText()
    pieces = [text.feed(data[a:b]) for a, b in itertools.pairwise(bounds)]
    assert "".join(pieces) + text.finish() == data.decode().strip()
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_lone_byte_at_the_end_is_shown_as_a_replacement_character() -> None:
    texts, answer, _ = ask([fake_response(b"ok \xe4", [1])])
    assert answer.text == "ok \ufffd"
    assert "".join(texts) == answer.text


@pytest.mark.parametrize(
    ("max_tokens", "num_input_tokens", "num_output_tokens", "reason"),
    [
        (3, 10, 3, "length"),  # used up max_tokens
        (4, 10, 3, "stop"),
        (None, 10, 100, "length"),  # used up the server's default
        (50, 997, 3, "length"),  # used up max_seq_len 1000
        (50, 996, 3, "stop"),
    ],
)
def test_finish_reason(max_tokens, num_input_tokens, num_output_tokens, reason) -> None:
    response = fake_response(b"x", range(num_output_tokens), num_input_tokens=num_input_tokens)
    sampling = {} if max_tokens is None else {"max_tokens": max_tokens}
    assert ask([response], **sampling)[1].finish_reason == reason


def test_ttft_is_the_first_chunk_with_text() -> None:
    _, answer, _ = ask([fake_response(b"", [1]), 0.03, fake_response(b"x", [2]), 0.03])
    assert answer.ttft_s is not None
    assert 0.03 <= answer.ttft_s < answer.latency_s
    assert ask([fake_response(b"", [1])])[1].ttft_s is None


def test_closing_the_iterator_stops_the_generation() -> None:
    transport = FakeTransport([fake_response(b"a", [1]), 0.01, fake_response(b"b", [2])] * 50)
    with Client(transport=transport) as client:
        chunks = client.stream("Hi")
        assert next(chunks).text == "a"
        chunks.close()
    assert transport.stopped == [transport.requests[0][0]]
    assert transport.closed_streams == 1


def test_cancelling_the_task_stops_the_generation() -> None:
    transport = FakeTransport([fake_response(b"a", [1]), 60.0])

    async def main() -> None:
        async with AsyncClient(transport=transport) as client:
            task = asyncio.create_task(client.generate("Hi"))
            while not transport.requests:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert len(transport.stopped) == 1
    assert transport.closed_streams == 1


@pytest.mark.parametrize("steps", range(8))
def test_a_cancel_that_comes_with_a_response_is_not_lost(steps: int) -> None:
    """Before Python 3.12 `asyncio.wait_for` returns the response and forgets the cancel."""

    class Waiting(FakeTransport):
        async def stream(self, *_args: object, **_options: object):
            yield await first
            await asyncio.sleep(60)

    first: asyncio.Future[dict]

    async def main() -> None:
        nonlocal first
        first = asyncio.get_running_loop().create_future()
        client = AsyncClient(transport=Waiting([]))

        async def consume() -> None:
            async for _ in client.stream("Hi"):
                pass

        task = asyncio.create_task(consume())
        for _ in range(5):
            await asyncio.sleep(0)
        first.set_result(fake_response(b"a", [1]))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=30)
        assert task.cancelled()

    asyncio.run(main())


def test_what_a_brief_response_leaves_out_is_not_missed() -> None:
    responses = [fake_response(b"a", [1]), fake_response(b"b", [2])]
    for response in responses:
        for name in ("error", "stopped", "num_output_tokens", "log_probs", "top_token_ids"):
            del response[name]

    class Brief(FakeTransport):
        async def stream(self, *_args: object, **_options: object):
            for response in self.script:
                yield response

    with Client(transport=Brief(responses)) as client:
        answer = client.generate("Hi", max_tokens=3)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("ab", [1, 2], "stop")


def test_the_deadline_stops_the_generation() -> None:
    transport = FakeTransport([fake_response(b"a", [1]), 60.0])
    with Client(transport=transport) as client, pytest.raises(RequestTimedOut, match=r"0\.05 s"):
        client.generate("Hi", timeout_s=0.05)
    assert len(transport.stopped) == 1


@pytest.mark.parametrize("error", [InvalidRequest("x"), RequestFailed("y"), ServerUnavailable("z")])
def test_errors_arrive_as_they_are(error: Exception) -> None:
    with Client(transport=FakeTransport([error])) as client, pytest.raises(type(error)):
        client.generate("Hi")


def test_an_error_as_data_is_an_error() -> None:
    with Client(transport=FakeTransport([fake_response(b"", error="too long")])) as client:
        with pytest.raises(RequestFailed, match="too long"):
            client.generate("Hi")
        with pytest.raises(RequestFailed, match="too long"):
            list(client.stream("Hi"))


def test_request_tensors() -> None:
    tensors = request_tensors("Hi", [b"png"], [], {"max_tokens": 3}, True)
    assert {name: value.tolist() for name, value in tensors.items()} == {
        "stream": [True],
        "text_input": [b"Hi"],
        "images": [b"png"],
        "sampling_parameters": [b'{"max_tokens": 3}'],
    }
    messages = [{"role": "user", "content": "é"}]
    tensors = request_tensors(messages, [], [b"a", b"b\0"], {}, False)
    assert set(tensors) == {"stream", "messages", "videos"}
    assert json.loads(tensors["messages"][0]) == messages
    assert tensors["videos"].tolist() == [b"a", b"b\0"]


def test_a_stop_string_is_no_length() -> None:
    script = [fake_response(b"x", [1]), fake_response(b"", [2], stopped=True), fake_response(b"")]
    _, answer, transport = ask(script, max_tokens=2, stop=["END"])
    assert (answer.token_ids, answer.finish_reason) == ([1, 2], "stop")
    assert transport.stopped == []  # postprocessing has done it
    with Client(transport=transport) as client:
        assert client.generate("Hi", stop="END").finish_reason == "stop"
        client.generate("Hi")
    # a whole answer with a stop string is streamed: it ends the generation only there
    assert [tensors["stream"].item() for _, tensors in transport.requests[1:]] == [True, False]


def test_n_answers_have_seeds_of_their_own() -> None:
    transport = FakeTransport([fake_response(b"x", [1])])
    with Client(transport=transport) as client:
        assert len(client.generate_n("Hi", 3, seed=2**64 - 2, top_p=0.5)) == 3
        client.generate_n("Hi", 2)
        with pytest.raises(InvalidRequest, match="n is 0"):
            client.generate_n("Hi", 0)
    sent = [json.loads(tensors["sampling_parameters"][0]) for _, tensors in transport.requests]
    assert [settings["seed"] for settings in sent] == [2**64 - 2, 2**64 - 1, 0, None, None]
    assert [settings.get("top_p") for settings in sent] == [0.5] * 3 + [None] * 2


def test_the_first_error_ends_all_n() -> None:
    transport = FakeTransport([RequestFailed("no")])
    with Client(transport=transport) as client, pytest.raises(RequestFailed, match="no"):
        client.generate_n("Hi", 3)
    assert transport.closed_streams == 3


def test_what_a_request_costs() -> None:
    prepared = {
        "tiles_per_image": np.array([13, 3], np.int32),
        "input_lengths": np.array([[4200]], np.int32),
        "request_output_len": np.array([[64]], np.int32),
    }
    transport = FakeTransport([prepared])
    with Client(transport=transport) as client:
        cost = client.count_tokens("Hi", images=[b"a", b"b"], max_tokens=64)
    assert cost == RequestCost((13, 3), 16 * 256, 4200, 64)
    assert cost.num_tiles == 16
    (model, tensors), *others = transport.requests
    assert (model, others) == ("preprocessing", [])
    assert tensors["images"].tolist() == [b"a", b"b"]
    refusing = FakeTransport([InvalidRequest("too long")])
    with Client(transport=refusing) as client, pytest.raises(InvalidRequest, match="too long"):
        client.count_tokens("Hi")


def test_every_request_has_its_own_id() -> None:
    transport = FakeTransport([fake_response(b"x", [1])])
    with Client(transport=transport) as client:
        for _ in range(3):
            client.generate("Hi")
    assert len({request_id for request_id, _ in transport.requests}) == 3


def test_every_status_code_is_translated() -> None:
    import grpc
    from tritonclient.utils import InferenceServerException

    expected = {
        "INVALID_ARGUMENT": InvalidRequest,
        "UNAVAILABLE": ServerUnavailable,
        "NOT_FOUND": ServerUnavailable,
        "DEADLINE_EXCEEDED": RequestTimedOut,
    }
    for code in grpc.StatusCode:
        error = InferenceServerException("in ensemble 'internvl', why", status=str(code))
        ours = _translated(error, "host:1")
        assert type(ours) is expected.get(code.name, RequestFailed), code
        assert "why" in str(ours)
        assert "in ensemble" not in str(ours)


def test_nobody_listening_is_said_at_once() -> None:
    with Client("127.0.0.1:9") as client, pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:9"):
        client.generate("Hi", timeout_s=20)
