"""The chat page: what is served, what it may load, and that its script reads our streams."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gateway.app import create_app
from gateway.serve import DEMO_SAMPLES, main
from internvl_triton.client import AsyncClient
from internvl_triton.errors import InvalidRequest
from internvl_triton.fake_transport import fake_response
from tests.unit.gateway_client import HI, ScriptedService, ask

ROOT = Path(__file__).parents[2]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def get_all(*paths: str, **options: Any) -> list[httpx2.Response]:
    """options are those of `create_app`."""

    async def talk(client: openai.AsyncOpenAI) -> list[httpx2.Response]:
        return [await client._client.get(path) for path in paths]

    return ask(ScriptedService([]), talk, **options)


def get(path: str) -> httpx2.Response:
    return get_all(path)[0]


class Parsed(HTMLParser):
    """attributes: (tag, name, value) of all of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.script = self.style = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.script += data
        elif self.cdata_elem == "style":
            self.style += data


def page() -> Parsed:
    return Parsed(get("/").text)


def test_the_page_is_served() -> None:
    response = get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.text == (ROOT / "gateway" / "page.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else() -> None:
    parsed = page()
    assert not re.search(r"https?://|//[\w.-]+/", get("/").text)
    assert not re.search(r"url\(|@import", parsed.style)
    assert not re.search(r"\bimport\b", parsed.script)
    references = [item for item in parsed.attributes if item[1] in ("src", "href", "action")]
    assert references == [("link", "href", "data:,")]  # no icon: none is asked for


def test_the_policy_allows_this_script_and_this_style_only() -> None:
    parsed = page()
    given = get("/").headers["content-security-policy"]
    policy = dict(rule.split(" ", 1) for rule in given.split("; "))
    for name, content in (("script-src", parsed.script), ("style-src", parsed.style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    # Such attributes would be blocked by it.
    assert [a for a in parsed.attributes if a[1] == "style" or a[1].startswith("on")] == []


def test_what_the_model_says_is_never_parsed_as_html() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval|srcdoc"
    assert not re.search(forbidden, page().script)


def test_every_control_has_a_name() -> None:
    html = get("/").text
    for control in re.findall(r"<(?:input|textarea)[^>]*>", html):
        labelled = re.search(rf"<label>[^<]*{re.escape(control)}", html)
        assert labelled or "aria-label=" in control or control.endswith(" hidden>"), control
    for text in re.findall(r"<button[^>]*>([^<]*)<", html):
        assert text.strip()


def test_samples() -> None:
    expected = json.loads((ROOT / "demo" / "samples" / "samples.json").read_text())
    names = {name for sample in expected for name in [*sample["images"], sample["video"]] if name}
    paths = [f"/samples/{name}" for name in names]
    listed, *files = get_all("/samples", *paths, samples=DEMO_SAMPLES)
    assert listed.headers["content-type"] == "application/json"
    assert listed.json() == expected
    types = {".jpg": "image/jpeg", ".mp4": "video/mp4"}
    for name, served in zip(names, files, strict=True):
        assert served.content == (DEMO_SAMPLES / name).read_bytes()
        assert served.headers["content-type"] == types[Path(name).suffix]
        assert served.headers["x-content-type-options"] == "nosniff"


def test_samples_can_be_off() -> None:
    off = get_all("/samples", "/samples/wide.jpg")
    assert [response.status_code for response in off] == [404, 404]


def test_nothing_but_the_samples_is_served(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "samples")
    for secret in (tmp_path / "secret.txt", folder / "secret.txt"):
        secret.write_text("secret")
    names = ["samples.json", "secret.txt", "nothing.jpg", "one.jpg%00", "..%5Csecret.txt"]
    names += ["..%2Fsecret.txt", "%2E%2E/secret.txt", f"%2F{tmp_path}/secret.txt"]
    paths = [f"/samples/{name}" for name in names]
    picture, *refused = get_all("/samples/one.jpg", *paths, samples=folder)
    assert picture.content == b"picture"
    for path, response in zip(paths, refused, strict=True):
        assert response.status_code == 404, path
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_with_keys_the_page_is_open_and_the_api_is_not() -> None:
    paths = ("/", "/samples", "/samples/wide.jpg", "/v1/models")
    responses = get_all(*paths, samples=DEMO_SAMPLES, api_keys={"sk-one"})
    assert [response.status_code for response in responses] == [200, 200, 200, 401]


def write_samples(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    sample = {
        "name": "one",
        "shows": "",
        "images": ["one.jpg"],
        "video": None,
        "sampling_parameters": {},
        "turns": [{"question": "What?", "answer": "One."}],
    }
    (folder / "samples.json").write_text(json.dumps([sample | changes]))
    (folder / "one.jpg").write_bytes(b"picture")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["two.jpg"]}, "names two.jpg, which is not there"),
        ({"images": ["../secret.txt"]}, "unusable"),
        ({"video": ".."}, "which is not there"),
        ({"turns": []}, "unusable"),
    ],
)
def test_broken_samples_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = write_samples(tmp_path / "samples", **changes)
    with pytest.raises(InvalidRequest, match=message):
        create_app(AsyncClient(transport=ScriptedService([])), samples=folder)


def test_a_directory_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--samples={tmp_path}", "--port=0"]) == 1
    assert "samples.json" in capsys.readouterr().err


def node(program: str, folder: Path, *options: str) -> str:
    """What the program prints; a wrong one fails with what node says."""
    file = folder / "page.mjs"
    file.write_text(program)
    done = subprocess.run(["node", *options, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_node
def test_the_script_parses(tmp_path: Path) -> None:
    node(page().script, tmp_path, "--check")


@needs_node
@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 1_000_000])
def test_the_script_reads_a_stream_however_it_is_cut(tmp_path: Path, chunk_bytes: int) -> None:
    pieces = ["A red", " 圆 🙂 ", "\n\ndata: [DONE]\r\n", "end"]

    async def talk(client: openai.AsyncOpenAI) -> bytes:
        options = {"include_usage": True}
        body = {"model": "fake", "messages": HI, "stream": True, "stream_options": options}
        return (await client._client.post("/v1/chat/completions", json=body)).content

    script = [fake_response(piece.encode(), [number]) for number, piece in enumerate(pieces)]
    stream = ask(ScriptedService(script), talk)
    function = re.search(r"^async function\* events\(.*?^}\n", page().script, re.M | re.S)
    assert function
    program = f"""
const bytes = Buffer.from({json.dumps(base64.b64encode(stream).decode())}, "base64");
const body = new ReadableStream({{
  start(controller) {{
    for (let at = 0; at < bytes.length; at += {chunk_bytes}) {{
      controller.enqueue(new Uint8Array(bytes.subarray(at, at + {chunk_bytes})));
    }}
    controller.close();
  }},
}});
{function[0]}
const read = [];
for await (const data of events(body)) read.push(data);
console.log(JSON.stringify(read));
"""
    *events, last = json.loads(node(program, tmp_path))
    assert last == "[DONE]"
    parsed = [json.loads(event) for event in events]
    texts = [choice["delta"].get("content", "") for event in parsed for choice in event["choices"]]
    assert "".join(texts) == "".join(pieces)
    assert parsed[-1]["usage"]["completion_tokens"] == len(pieces)
