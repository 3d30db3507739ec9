"""The accuracy benchmark with a scripted service: what is asked, scored, listed and compared."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import (
    Result,
    ask_all,
    check_output,
    comparison_table,
    main,
    measure,
    read_results,
    run_label,
    score_table,
    write_results,
)
from benchmarks.vqa import VqaQuestion, read_vqa, scene_questions
from internvl_triton import tensor_contract as contract
from internvl_triton.client import AsyncClient
from internvl_triton.errors import InvalidImage, InvalidRequest
from internvl_triton.fake_transport import FakeTransport, fake_response
from internvl_triton.preprocessing import Request


def question(number: int, text: str, *answers: str, kind: str = "shape") -> VqaQuestion:
    request = Request(text_input=text, sampling_parameters='{"max_tiles": 1}')
    return VqaQuestion(str(number), kind, f"picture {number // 2}", text, request, answers)


class Echo(FakeTransport):
    """Answers with the question; refuses one about a cat. Answers nothing until `expected`
    requests have run at the same time, and counts how many ever did."""

    def __init__(self, expected: int) -> None:
        super().__init__([])
        self.expected = expected
        self.running = self.most = 0
        self.full = asyncio.Event()

    async def stream(
        self,
        tensors: dict[str, Any],
        request_id: str,
        timeout_s: float,
        outputs: Sequence[str] = (),
    ) -> AsyncIterator[dict[str, Any]]:
        self.requests.append((request_id, tensors))
        text = tensors[contract.TEXT_INPUT.name][0]
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self.expected:
            self.full.set()
        await asyncio.wait_for(self.full.wait(), 60)
        self.running -= 1
        if b"cat" in text:
            raise InvalidImage("image 1 is not an image")
        yield fake_response(text, [1, 2])


async def ask(transport: Echo, questions: list[VqaQuestion]) -> list[Result]:
    async with AsyncClient(transport=transport) as client:
        return await ask_all(client, iter(questions), concurrency=transport.expected, max_tokens=9)


def test_answers_are_scored_in_order_and_failures_are_wrong() -> None:
    transport = Echo(expected=3)
    questions = [question(i, f"star {i}", f"star {i}") for i in range(6)]
    questions += [question(6, "a cat", "a cat"), question(7, "kitten", "sitting", "no")]
    results = asyncio.run(ask(transport, questions))
    assert [result.id for result in results] == list("01234567")
    assert [result.exact for result in results] == [True] * 6 + [False, False]
    assert results[6].error == "InvalidImage: image 1 is not an image"
    assert (results[6].given, results[6].anls) == ("", 0.0)
    assert results[7].anls == pytest.approx(1 - 3 / 7)
    assert transport.most == 3
    sent = json.loads(transport.requests[0][1][contract.SAMPLING_PARAMETERS.name][0])
    assert sent == {"max_tokens": 9, "max_tiles": 1}


def results(rights: str, *, kind: str = "shape", group: str = "") -> list[Result]:
    """One result per letter: r(ight), w(rong), f(ailed)."""
    return [
        Result(
            id=f"{kind}{number}",
            kind=kind,
            group=group or f"{kind}{number}",
            question="?",
            answers=("A star.",),
            given={"r": "A star.", "w": "no", "f": ""}[letter],
            exact=letter == "r",
            anls=float(letter == "r"),
            error="ServerUnavailable: gone" if letter == "f" else "",
        )
        for number, letter in enumerate(rights)
    ]


def test_table_by_kind() -> None:
    head, everything, shape, number = score_table([*results("rrrw"), *results("rf", kind="number")])
    assert head == ["kind", "asked", "exact", "95 %", "ANLS", "95 %", "failed"]
    assert everything[:3] == ["all", "6", "66.67 %"]
    assert (everything[4], everything[6]) == ("66.67 %", "1")
    assert shape[:4] == ["shape", "4", "75.00 %", "30.1 - 95.4"]
    assert (number[1], number[2], number[6]) == ("2", "50.00 %", "1")


def test_a_single_kind_is_not_shown_twice() -> None:
    assert [row[0] for row in score_table(results("rw"))] == ["kind", "all"]


def test_comparison_pairs_questions_by_id() -> None:
    ours, theirs = results("rrrrrrrw"), results("rwwwwwww")
    head, row = comparison_table([*ours, *results("r", kind="other")], theirs)
    cells = dict(zip(head[:8], row[:8], strict=True))
    assert cells["both asked"] == "8"
    assert (cells["exact"], cells["other"]) == ("87.50 %", "12.50 %")
    assert (cells["only here"], cells["only other"]) == ("6", "0")
    assert cells["McNemar p"] == "0.0312"  # 2 / 2^6
    assert cells["exact - other"] == "+75.00"
    low, high = map(float, row[8].split(" .. "))
    assert 0 < low < 75 < high <= 100
    assert row[-1] == "25.00 %"  # the first and the last answer
    _, mirrored = comparison_table(theirs, ours)
    assert mirrored[7] == "-75.00"


def test_runs_that_cannot_be_compared() -> None:
    with pytest.raises(InvalidRequest, match="no question in common"):
        comparison_table(results("r"), results("r", kind="number"))
    other = [Result(**{**vars(results("r")[0]), "answers": ("No.",)})]
    with pytest.raises(InvalidRequest, match="other answers"):
        comparison_table(results("r"), other)


def test_results_survive_the_file(tmp_path: Path) -> None:
    written = [*results("rwf"), *results("r", kind="ünï"), *results("w", kind="two\u2028lines\x85")]
    write_results(tmp_path / "a.jsonl", {"model": "demo"}, written)
    assert read_results(tmp_path / "a.jsonl") == ({"model": "demo"}, written)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"prompt": "Hi"}\n', r"out\.jsonl was not written by --output"),
        (b'{"run": 5}\n', r"out\.jsonl was not written by --output"),
        (b'{"run": {}}\n\xe9', r"out\.jsonl was not written by --output"),
        (b'{"run": {}}\n{"id": "1", "ki', "if the last line is cut off, delete that line"),
        (b'{"run": {}}\n', "holds no answer"),
    ],
)
def test_what_is_no_file_of_results(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(text)
    with pytest.raises(InvalidRequest, match=message):
        read_results(tmp_path / "out.jsonl")


# --- what is written while questions are asked ----------------------------------------------------


async def measured(transport: Echo, questions: Iterator[VqaQuestion], output: Path) -> None:
    async with AsyncClient(transport=transport) as client:
        await measure(client, questions, {}, output=output, concurrency=1, max_tokens=9)


def test_a_finished_run_is_in_the_order_of_the_questions(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    asyncio.run(measured(Echo(expected=1), map(question, range(5), "abcde", "abxde"), output))
    run, written = read_results(output)
    assert run == {"model": "fake"}
    assert [result.id for result in written] == list("01234")
    assert [result.exact for result in written] == [True, True, False, True, True]
    assert list(tmp_path.iterdir()) == [output]


def test_answers_survive_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> Iterator[VqaQuestion]:
        yield question(0, "star", "star")
        yield question(1, "moon", "sun")
        raise InvalidRequest("a.png has gone")

    output = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="has gone"):
        asyncio.run(measured(Echo(expected=1), failing(), output))
    run, written = read_results(output)
    assert run == {"model": "fake", "finished": False}
    assert [(result.given, result.exact) for result in written] == [("star", True), ("moon", False)]
    assert f"the answers so far are in {output}" in capsys.readouterr().err
    assert comparison_table(written, written)[1][1] == "2"
    assert run_label(run, written) == "fake (None), which ended early, after 2 answers"
    assert run_label({"model": "fake", "served": "TP 1"}, written) == "fake (TP 1)"


def test_answers_survive_an_interrupt(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def written() -> list[str]:
        return output.read_text().splitlines()[1:] if output.exists() else []

    def interrupted() -> Iterator[VqaQuestion]:
        yield question(0, "star", "star")
        yield question(1, "moon", "moon")
        assert len(written()) == 2  # both are there before the run ends
        signal.raise_signal(signal.SIGINT)
        yield question(2, "sun", "sun")
        time.sleep(0.1)
        yield question(3, "sun", "sun")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(measured(Echo(expected=1), interrupted(), output))
    run, found = read_results(output)
    assert run["finished"] is False
    assert [result.given for result in found][:2] == ["star", "moon"]
    assert len(found) < 4


def test_output_is_checked_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = ["--server", "127.0.0.1:9", "--output"]
    assert main([*nobody, str(tmp_path / "deep" / "a.jsonl")]) == 1
    message = r"a.jsonl cannot be written: No such file or directory; name a file in a folder"
    assert message in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match="it is there and not a file"):
        check_output(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidRequest, match="cannot be written: Not a directory"):
        check_output(tmp_path / "file" / "a.jsonl")
    check_output(tmp_path / "file")
    check_output(tmp_path / "new.jsonl")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]
    assert main([*nobody, str(tmp_path / "file")]) == 1  # nobody answers: what was there stays
    assert "cannot be reached" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_scene_questions_repeat_and_know_their_answers() -> None:
    one, again = list(scene_questions(5)), list(scene_questions(5))
    assert one == again
    assert len({asked.id for asked in one}) == len(one) > 10
    assert len({asked.group for asked in one}) == 5
    for asked in one:
        messages = json.loads(asked.request.messages or "")
        assert messages[-1]["content"][-1]["text"] == asked.text
        assert asked.answers[0]
        assert messages[-1]["role"] == "user"


def test_vqa_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    lines = [
        {"question": "What?", "image": "a.png", "answer": ["x", "y"], "question_id": 34602},
        {"prompt": "Who?", "images": ["a.png"], "answers": "z", "id": "7", "kind": "people"},
        {"messages": [{"role": "user", "content": "Hi"}], "answer": "Hello!"},
    ]
    file = tmp_path / "vqa.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    first, second, third = read_vqa(file)
    assert first.text == "What?"
    assert (first.id, first.answers, first.request.images) == ("34602", ("x", "y"), [b"png"])
    assert (second.id, second.kind, second.text, second.answers) == ("7", "people", "Who?", ("z",))
    assert first.group == second.group != third.group
    assert (third.id, third.kind) == ("3", "all questions")


def vqa_file(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / "a.png").write_bytes(b"png")
    (folder / "vqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "vqa.jsonl"


def test_lines_of_vqav2_textvqa_and_docvqa(tmp_path: Path) -> None:
    vqav2 = {
        "question_id": 262148000, "image_id": 262148, "question": "Is it?", "image": "a.png",
        "question_type": "is it", "answer_type": "yes/no", "multiple_choice_answer": "yes",
        "answers": [
            {"answer": "yes", "answer_confidence": "maybe", "answer_id": 1},
            {"answer": "no", "answer_confidence": "no", "answer_id": 2},
        ],
    }  # fmt: skip
    textvqa = {
        "question": "Who?", "image_id": "003a8ae2ef43b901", "image_classes": ["Camera"],
        "flickr_original_url": "https://a", "flickr_300k_url": "https://b", "image_width": 9,
        "image_height": 8, "answers": ["nous", "dakota"], "question_tokens": ["who"],
        "question_id": 34602, "set_name": "val", "image": "a.png", "id": 5,
    }  # fmt: skip
    docvqa = {
        "questionId": 49153, "question": "What?", "question_types": ["form"], "image": "a.png",
        "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81",
        "answers": ["0.28"], "data_split": "val",
    }  # fmt: skip
    first, second, third = read_vqa(vqa_file(tmp_path, vqav2, textvqa, docvqa))
    assert (first.id, first.text, first.answers) == ("262148000", "Is it?", ("yes", "no"))
    assert (second.id, second.answers) == ("34602", ("nous", "dakota"))
    assert (third.id, third.answers, third.request.images) == ("49153", ("0.28",), [b"png"])


_NAME = "the name of a file or a list of names"
_ANSWER = "a text, or a list of texts or of objects with a text as `answer`"
_MESSAGES = "a list of objects with role and content"
_SAMPLING = 'an object such as {"max_tokens": 64}'


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("image", 5, _NAME),
        ("images", None, _NAME),
        ("images", ["a.png", 5], _NAME),
        ("videos", {"a": 1}, _NAME),
        ("question", 3, "a text"),
        ("prompt", None, "a text"),
        ("messages", 3, _MESSAGES),
        ("messages", "Hi", _MESSAGES),
        ("messages", ["Hi"], _MESSAGES),
        ("sampling_parameters", [1], _SAMPLING),
        ("sampling_parameters", None, _SAMPLING),
        ("answer", [], _ANSWER),
        ("answer", None, _ANSWER),
        ("answers", [1], _ANSWER),
        ("answers", ["yes", {"answer": 1}], _ANSWER),
        ("answers", {"text": "yes"}, _ANSWER),
    ],
)
def test_values_of_a_wrong_type(key: str, value: object, allowed: str, tmp_path: Path) -> None:
    line = {key: value}
    if key not in ("question", "prompt", "messages"):
        line["question"] = "What?"
    if not key.startswith("answer"):
        line["answer"] = "x"
    message = f"vqa.jsonl, line 2: {key} is {json.dumps(value)}; it must be {allowed}"
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        read_vqa(vqa_file(tmp_path, {"question": "Who?", "answer": "I"}, line))


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    file = vqa_file(tmp_path, {"question": ["x" * 100], "answer": "x"})
    with pytest.raises(InvalidRequest, match=r'question is \["x{75}\.\.\.; it must be a text'):
        read_vqa(file)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"images": 1}, "has an unknown key 'images'"),
        ({"timeout_s": 1}, "has an unknown key 'timeout_s'"),
        ({"max_tokens": "5"}, r'\.max_tokens is "5"; it must be an integer from 1'),
    ],
)
def test_sampling_of_a_line_is_checked(
    sampling: dict[str, Any], message: str, tmp_path: Path
) -> None:
    line = {"question": "x", "answer": "y", "sampling_parameters": sampling}
    with pytest.raises(InvalidRequest, match=f"line 1: sampling_parameters ?{message}"):
        read_vqa(vqa_file(tmp_path, line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"What?"', "line 1 holds a str; give one object a line"),
        ('{"question": "x"}', "line 1 needs `answer`: a text, or a list of texts"),
        ('{"answer": "x"}', "line 1 must have exactly one of question and messages"),
        ('{"question": "x", "prompt": "x", "answer": "y"}', "two names: question and prompt;"),
        ('{"question": "x", "answer": "y", "anser": "z"}', r"line 1 has \['anser'\]; allowed: ans"),
        ('{"question": "x", "answer": "y", "image_id": 1}', "by image_id only; give its file"),
        (r'{"question": "\ud800", "answer": "y"}', "line 1 is not valid JSON .*surrogates"),
        ("[" * 100_000, "line 1 is not valid JSON"),
    ],
)
def test_what_is_no_vqa_file(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vqa.jsonl").write_text(line)
    with pytest.raises(InvalidRequest, match=message):
        read_vqa(tmp_path / "vqa.jsonl")


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    lines = '{"question": "x", "answer": "y"}\n{"question": "é", "answer": "y"}\n'
    (tmp_path / "vqa.jsonl").write_bytes(lines.encode("latin-1"))
    with pytest.raises(
        InvalidRequest, match=r"vqa\.jsonl, line 2 is not UTF-8 \(byte 0xe9\); save"
    ):
        read_vqa(tmp_path / "vqa.jsonl")


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "plain"]
    lines = [json.dumps({"question": t, "answer": t}, ensure_ascii=False) for t in texts]
    lines[-1] = lines[-1].replace(", ", ",\r")
    (tmp_path / "vqa.jsonl").write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert [asked.text for asked in read_vqa(tmp_path / "vqa.jsonl")] == texts


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no.png", "No such file or directory"),
        ("folder", "it is not a file"),
        ("pipe", "it is not a file"),
        ("a.png/b.png", "Not a directory"),
        ("a\0b", "embedded null byte"),
    ],
)
@pytest.mark.parametrize("key", ["image", "videos"])
def test_files_are_checked_before_anything_is_asked(
    key: str, name: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    good = {"question": "x", "image": "a.png", "answer": "y"}
    file = vqa_file(tmp_path, good, {"question": "x", key: name, "answer": "y"})
    assert main(["--server", "127.0.0.1:9", "--jsonl", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"vqa.jsonl, line 2 names {name}, which cannot be read: {problem} " in error
    assert f"({tmp_path / name}); put the file there or correct the line" in error


def test_a_picture_is_read_when_its_turn_comes(tmp_path: Path) -> None:
    line = {"question": "x", "image": "a.png", "answer": "y"}
    asked = read_vqa(vqa_file(tmp_path, line, line))
    assert next(asked).request.images == [b"png"]
    (tmp_path / "a.png").write_bytes(b"another")
    assert next(asked).request.images == [b"another"]


def test_vqa_ids_are_unique(tmp_path: Path) -> None:
    line = '{"question": "x", "answer": "y", "id": 1}\n'
    (tmp_path / "vqa.jsonl").write_text(2 * line)
    with pytest.raises(InvalidRequest, match="line 2 has the id '1' of an earlier line"):
        read_vqa(tmp_path / "vqa.jsonl")


def test_command_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", "none.jsonl"]) == 1
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    assert main(["--server", "127.0.0.1:9", "--examples", "1"]) == 1
    assert "127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--examples", "0"])
