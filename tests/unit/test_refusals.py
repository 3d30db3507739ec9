"""Too many requests and requests that take too long: the engine's answer and the client's error."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from internvl_triton import tensor_contract as contract
from internvl_triton.client import Client
from internvl_triton.cpu_llm import sequence
from internvl_triton.cpu_llm.scheduler import Scheduler
from internvl_triton.errors import (
    InternVLTritonError,
    Overloaded,
    RequestFailed,
    RequestTimedOut,
    ServerUnavailable,
)
from internvl_triton.fake_transport import FakeTransport, fake_response
from internvl_triton.grpc_transport import _translated
from tests.unit.test_cpu_engine import Answer, CountingModel, request

LATE = "timed out: no complete answer within 60 s of reaching the language model"


class Clock(SimpleNamespace):
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sequence, "time", clock)
    return clock


@pytest.fixture
def model() -> CountingModel:
    return CountingModel(hold=True)


@pytest.fixture
def engine(model: CountingModel, clock: Clock) -> Iterator[Scheduler]:
    engine = Scheduler(
        model, max_batch_size=1, max_seq_len=100, max_visual_tokens=0, max_queue_size=2
    )
    yield engine
    model.grant(1000)
    engine.close()


def ask(engine: Scheduler, **changes: object) -> Answer:
    answer = Answer()
    engine.submit(request([5], 10, **changes), answer)
    return answer


def test_a_late_request_ends_with_what_it_has_and_an_error(
    engine: Scheduler, model: CountingModel, clock: Clock
) -> None:
    late = ask(engine, timeout_s=60.0, streaming=True)
    model.wait_for_step()
    clock.now = 60.0  # not later than 60 s
    model.grant(1)
    model.wait_for_step()
    assert not late.ended
    clock.now = 60.1
    model.grant(1)
    assert late.wait().error.startswith(LATE)
    assert late.tokens == [6, 7]


def test_a_request_may_run_out_of_time_while_it_waits(
    engine: Scheduler, model: CountingModel, clock: Clock
) -> None:
    running = ask(engine)
    model.wait_for_step()
    waiting = ask(engine, timeout_s=60.0)
    clock.now = 61.0
    model.grant(1)
    assert waiting.wait().error.startswith(LATE)
    model.grant(100)
    assert running.wait().error == ""
    assert running.tokens == list(range(6, 16))
    assert engine.stats().failed == 1


def test_without_a_timeout_nothing_is_late(
    engine: Scheduler, model: CountingModel, clock: Clock
) -> None:
    answer = ask(engine)
    clock.now = 1e9
    model.grant(100)
    assert answer.wait().error == ""


def failure(error: str) -> InternVLTritonError:
    """What the client raises when the language model reports `error` as data."""
    with (
        Client(transport=FakeTransport([fake_response(b"", error=error)])) as client,
        pytest.raises(InternVLTritonError) as raised,
    ):
        client.generate("Hi")
    return raised.value


def test_the_client_tells_them_apart() -> None:
    overloaded = failure(contract.OVERLOADED + "9 are waiting")
    assert type(overloaded) is Overloaded
    assert str(overloaded) == "9 are waiting"
    late = failure(contract.TIMED_OUT + "too late")
    assert type(late) is RequestTimedOut
    assert str(late) == "too late"
    assert type(failure("it is overloaded: ...")) is RequestFailed


def test_an_overloaded_service_is_not_told_to_stop_the_request() -> None:
    transport = FakeTransport([fake_response(b"", error=contract.OVERLOADED + "9 are waiting")])
    with Client(transport=transport) as client, pytest.raises(Overloaded):
        client.generate("Hi")
    assert transport.stopped == []


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("in ensemble 'internvl', [request id: 1] Exceeds maximum queue size", Overloaded),
        ("Maximum queue size of 64 has been reached, please try again later", Overloaded),
        ("Request for unknown model: 'internvl' has no available versions", ServerUnavailable),
    ],
)
def test_tritons_and_tensorrt_llms_refusals(message: str, kind: type[InternVLTritonError]) -> None:
    error = SimpleNamespace(status=lambda: None, message=lambda: message)
    assert type(_translated(error, "host:1")) is kind
