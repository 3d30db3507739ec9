"""The service as `curl` uses it: Triton's generate and generate_stream, plain JSON over HTTP."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Service
from tests.integration.pictures import encoded, picture

pytestmark = pytest.mark.triton

QUESTION = "What is a triangle?"
SAMPLING = json.dumps({"max_tokens": 24, "min_tokens": 24})
DATA_URL = b"data:image/png;base64," + base64.b64encode(encoded(picture(300, 300)))
BODIES = {
    "text": {"text_input": QUESTION, "sampling_parameters": SAMPLING},
    "picture": {
        "text_input": QUESTION,
        "images": [DATA_URL.decode()],
        "sampling_parameters": SAMPLING,
    },
}


def parsed(data: bytes) -> dict[str, Any]:
    """Triton writes the bytes of a string as they are, so its JSON need not be UTF-8."""
    values: dict[str, Any] = json.loads(data.decode("utf-8", "surrogateescape"))
    values["text_output"] = values["text_output"].encode("utf-8", "surrogateescape")
    return values


def post(service: Service, verb: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        f"http://{service.server.http_url}/v2/models/internvl/{verb}",
        data=json.dumps(body).encode(),
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        content: bytes = response.read()
    return content


def qwen2_bytes(checkpoint: Path, ids: list[int]) -> bytes:
    """What ids spell, by transformers' table of byte-level BPE."""
    pytest.importorskip("transformers")
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = Qwen2Tokenizer.from_pretrained(checkpoint).convert_ids_to_tokens(ids)
    return bytes(byte_of[character] for token in tokens for character in token)


@pytest.mark.parametrize("kind", BODIES)
def test_generate_and_generate_stream(qwen2: Service, kind: str) -> None:
    whole = parsed(post(qwen2, "generate", BODIES[kind]))
    events = post(qwen2, "generate_stream", {**BODIES[kind], "stream": True}).split(b"\n\n")
    assert events.pop() == b""
    assert all(event.startswith(b"data: ") for event in events)
    chunks = [parsed(event.removeprefix(b"data: ")) for event in events]

    assert len(chunks) >= 24
    assert b"".join(chunk["text_output"] for chunk in chunks) == whole["text_output"]
    assert [token for chunk in chunks for token in _ids(chunk)] == _ids(whole)
    assert len(_ids(whole)) == whole["num_output_tokens"] == 24
    assert sum(chunk["num_output_tokens"] for chunk in chunks) == 24
    assert {chunk["num_input_tokens"] for chunk in chunks} == {whole["num_input_tokens"]}
    assert {chunk["error"] for chunk in [*chunks, whole]} == {""}
    assert whole["text_output"] == qwen2_bytes(qwen2.checkpoint, _ids(whole))
    # Byte-level tokens: a chunk may end inside a character, and these do.
    assert any(_broken(chunk["text_output"]) for chunk in chunks)

    images = [DATA_URL] if "images" in BODIES[kind] else []
    answer = qwen2.client.generate(QUESTION, images=images, max_tokens=24, min_tokens=24)
    assert answer.token_ids == _ids(whole)
    assert answer.text == whole["text_output"].decode("utf-8", "replace").strip()


def test_an_error_is_a_400_with_its_message(qwen2: Service) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(qwen2, "generate", {"text_input": "Hi", "sampling_parameters": '{"temperature": -1}'})
    with refused.value as response:
        assert response.code == 400
        error = json.load(response)["error"]
    assert "invalid request: sampling_parameters.temperature is -1; it must be" in error


def test_an_error_in_a_stream_is_its_only_event(qwen2: Service) -> None:
    body = {"text_input": " ", "stream": True}
    try:
        content = post(qwen2, "generate_stream", body)
    except urllib.error.HTTPError as refused:
        with refused as response:
            content = response.read()
    (event,) = content.removeprefix(b"data: ").strip().split(b"\n\n")
    assert "text_input is empty" in json.loads(event)["error"]


def _ids(values: dict[str, Any]) -> list[int]:
    """A tensor of one element arrives as a plain number."""
    ids = values["output_ids"]
    return ids if isinstance(ids, list) else [ids]


def _broken(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False
