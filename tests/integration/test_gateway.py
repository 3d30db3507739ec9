"""The OpenAI-compatible endpoint over a socket, in front of the real server."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from benchmarks.running_gateway import Gateway, running_gateway
from internvl_triton.triton_server import find_free_port
from tests.integration.conftest import Service
from tests.integration.pictures import encoded, picture
from tests.integration.processes import eventually
from tests.integration.test_ensemble_cancel import BATCH, ENDLESS, all_places_are_free
from tests.integration.test_readme import ROOT, blocks

pytestmark = pytest.mark.triton

PICTURE = encoded(picture(900, 500))
QUESTION = "What is in the picture?"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be short."},
    {
        "role": "user",
        "content": [
            {
                "type": "image_url",
                "image_url": {"url": "data:image/png;base64," + base64.b64encode(PICTURE).decode()},
            },
            {"type": "text", "text": QUESTION},
        ],
    },
]


@pytest.fixture(scope="module")
def gateway(start_service: Callable[[str], Service]) -> Iterator[Gateway]:
    with running_gateway(start_service("qwen2").server.grpc_url) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="unused", base_url=gateway.url, max_retries=0) as client:
        yield client


@pytest.fixture
def model(qwen2: Service) -> str:
    return qwen2.client.limits().model


def grpc_answer(service: Service, **sampling: Any) -> Any:
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    return service.client.generate(messages, images=[PICTURE], **sampling)


def test_an_answer_about_a_picture_is_that_of_the_grpc_client(
    qwen2: Service, client: openai.OpenAI, model: str
) -> None:
    expected = grpc_answer(qwen2, max_tokens=24)
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=24)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.num_input_tokens > 3 * 256
    assert whole.usage.completion_tokens == expected.num_output_tokens == 24
    *pieces, last = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = [piece.choices[0].delta.content or "" for piece in pieces]
    assert "".join(texts) == expected.text
    assert len(texts) > 5
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.usage == whole.usage


def test_what_is_asked_reaches_the_engine(
    qwen2: Service, client: openai.OpenAI, model: str
) -> None:
    sampling = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "top_p": 0.9}
    expected = grpc_answer(qwen2, **sampling)
    other = grpc_answer(qwen2, **sampling | {"seed": 6})
    assert expected.text != other.text
    two = client.chat.completions.create(model=model, messages=MESSAGES, n=2, **sampling)
    assert [choice.message.content for choice in two.choices] == [expected.text, other.text]
    chosen = client.chat.completions.create(
        model=model, messages=MESSAGES, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert chosen.choices[0].message.content in ("yes", "no")
    assert chosen.choices[0].finish_reason == "stop"


def test_log_probs_name_the_tokens(qwen2: Service, client: openai.OpenAI, model: str) -> None:
    expected = grpc_answer(qwen2, max_tokens=4, logprobs=True, top_logprobs=2)
    made = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content
    assert content is not None
    spelled = b"".join(bytes(token.bytes or ()) for token in content)
    assert spelled.decode(errors="replace").strip() == expected.text
    assert [token.logprob for token in content] == pytest.approx(expected.log_probs, abs=1e-4)
    best = [[top.logprob for top in token.top_logprobs] for token in content]
    assert best == [list(row.values()) for row in expected.top_log_probs]


def test_ready(gateway: Gateway) -> None:
    root = gateway.url.removesuffix("/v1")
    assert httpx2.get(f"{root}/health/ready").status_code == 200
    assert "<html" in httpx2.get(f"{root}/").text


def test_the_services_refusals_are_400(client: openai.OpenAI, model: str) -> None:
    def refused(**request: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as told:
            client.chat.completions.create(**{"model": model, "messages": MESSAGES, **request})
        return told.value

    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    text = {"type": "text", "text": QUESTION}
    told = refused(messages=[{"role": "user", "content": [broken, text]}])
    assert "image 1" in told.message
    assert "max_tokens can be at most" in refused(max_tokens=1_000_000).message
    assert refused(stream=True, max_tokens=1_000_000).status_code == 400
    system = {"role": "system", "content": "late"}
    assert refused(messages=[*MESSAGES, system]).param == "messages[2]"


def test_clients_that_go_away_free_their_places(
    qwen2: Service, client: openai.OpenAI, model: str
) -> None:
    streams = []
    for number in range(BATCH):
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Question {number}?"}],
            stream=True,
            max_tokens=ENDLESS["max_tokens"],
            extra_body={"min_tokens": ENDLESS["min_tokens"]},
        )
        next(stream), next(stream)
        streams.append(stream)
    for stream in streams:
        stream.close()
    assert all_places_are_free(qwen2)


def test_a_client_that_goes_away_before_the_answer_frees_its_place(
    qwen2: Service, client: openai.OpenAI, model: str
) -> None:
    def give_up(number: int) -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=2).chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": f"Question {number}?"}],
                max_tokens=ENDLESS["max_tokens"],
                extra_body={"min_tokens": ENDLESS["min_tokens"]},
            )

    threads = [threading.Thread(target=give_up, args=(number,)) for number in range(BATCH)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_places_are_free(qwen2)


def test_the_readmes_python_example(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in blocks("python") if "from openai import" in block]
    program = block.replace("http://127.0.0.1:9000/v1", gateway.url)
    assert program != block
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a script closes its client by ending
        exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_readmes_curl_example(gateway: Gateway, model: str) -> None:
    (block,) = [block for block in blocks("sh") if "/chat/completions" in block]
    command = block.replace("localhost:9000/v1", gateway.url.removeprefix("http://"))
    command = command.replace('"demo"', json.dumps(model))
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True, cwd=ROOT)
    usage = json.loads(done.stdout)["usage"]
    assert usage["prompt_tokens"] > 256
    assert 0 < usage["completion_tokens"] <= 32


def test_a_signal_lets_running_answers_finish(qwen2: Service, model: str) -> None:
    url = qwen2.server.grpc_url
    options = ["--drain-timeout=60"]
    environment = {**os.environ, "GATEWAY_API_KEY": "sk-one"}
    with (
        running_gateway(url, options=options, environment=environment) as gateway,
        openai.OpenAI(api_key="sk-one", base_url=gateway.url, max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=200, stream=True
        )
        texts = [next(stream).choices[0].delta.content for _ in range(2)]
        gateway.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        assert gateway.process.wait(30) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert texts[0] == ""


def test_without_a_service(capfd: pytest.CaptureFixture[str]) -> None:
    with running_gateway(f"127.0.0.1:{find_free_port()}") as gateway:
        root = gateway.url.removesuffix("/v1")
        assert httpx2.get(f"{root}/health/live").status_code == 200
        assert httpx2.get(f"{root}/health/ready").status_code == 503
        with (
            openai.OpenAI(api_key="x", base_url=gateway.url, max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as told,
        ):
            client.chat.completions.create(model="demo", messages=MESSAGES)
        assert (told.value.status_code, told.value.code) == (503, "service_unavailable")
        assert "127.0.0.1" not in told.value.message
        gateway.process.send_signal(signal.SIGINT)
        assert eventually(lambda: gateway.process.poll() is not None)
        assert gateway.process.returncode == 0
    assert "Traceback" not in capfd.readouterr().err
