"""The README's table of the model card's examples, and the chat session behind many of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clients.chat_session import ChatSession
from clients.examples import EXAMPLES, IMAGES, VIDEO
from internvl_triton.client import Client
from internvl_triton.errors import RequestFailed
from internvl_triton.fake_transport import FakeTransport, fake_response

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "integration" / "test_card_examples.py"


def test_the_readme_lists_every_example_with_its_test() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| model card | `make examples EXAMPLE=` | test |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| [^|]+ \| `([a-z-]+)` \| `(\w+)", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(EXAMPLES)
    defined = set(re.findall(r"^def (test_\w+)", TESTS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {test for _, test in rows} <= defined


def test_their_pictures_are_there() -> None:
    assert all(path.is_file() for path in (*IMAGES, VIDEO))


def test_a_session_sends_every_turn_and_picture_again() -> None:
    transport = FakeTransport([fake_response(b" Yes. ", [1])])
    with Client(transport=transport) as client:
        chat = ChatSession(client, max_tokens=9)
        chat.ask("Two <image>?", images=[b"a", b"b"])
        chat.ask("And now?", videos=[b"c"])
        transport.script = [RequestFailed("no")]
        with pytest.raises(RequestFailed):
            chat.ask("Lost", images=[b"d"])
        transport.script = [fake_response(b"Yes.", [1])]
        chat.ask("Last?")
    last = transport.requests[-1][1]
    assert last["images"].tolist() == [b"a", b"b"]
    assert last["videos"].tolist() == [b"c"]
    turns = [
        (turn["role"], turn["content"] if turn["role"] == "assistant" else turn["content"][-1])
        for turn in json.loads(last["messages"][0])
    ]
    assert [turn for role, turn in turns if role == "assistant"] == ["Yes.", "Yes."]
    texts = [turn["text"] for role, turn in turns if role == "user"]
    assert texts == ["Two <image>?", "And now?", "Last?"]
    assert json.loads(last["sampling_parameters"][0]) == {"max_tokens": 9}
