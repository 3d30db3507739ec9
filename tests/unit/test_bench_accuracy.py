"""The accuracy benchmark with a scripted service: what is asked, scored, listed and compared."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import (
    Result,
    ask_all,
    comparison_table,
    main,
    read_results,
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
    written = [*results("rwf"), *results("r", kind="ünï")]
    write_results(tmp_path / "deep" / "a.jsonl", {"model": "demo"}, written)
    assert read_results(tmp_path / "deep" / "a.jsonl") == ({"model": "demo"}, written)
    (tmp_path / "b.jsonl").write_text('{"prompt": "Hi"}\n')
    with pytest.raises(InvalidRequest, match=r"b\.jsonl was not written by --output"):
        read_results(tmp_path / "b.jsonl")


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
    assert (first.id, first.answers, first.request.images) == ("34602", ("x", "y"), [b"png"])
    assert (second.id, second.kind, second.text, second.answers) == ("7", "people", "Who?", ("z",))
    assert first.group == second.group != third.group
    assert (third.id, third.kind) == ("3", "all questions")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"What?"', "line 1 holds a str; give one object a line"),
        ('{"question": "x"}', "line 1 needs `answer`: a text, or a list of texts"),
        ('{"question": "x", "answer": []}', "line 1 needs `answer`"),
        ('{"question": "x", "answer": [1]}', "line 1 needs `answer`"),
        ('{"question": "x", "prompt": "x", "answer": "y"}', "one thing by two names"),
        ('{"question": "x", "answer": "y", "split": "val"}', r"line 1 has \['prompt', 'split'\]"),
        ('{"question": "x", "image": "no.png", "answer": "y"}', r"no\.png, which cannot be read"),
    ],
)
def test_what_is_no_vqa_file(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "vqa.jsonl").write_text(line)
    with pytest.raises(InvalidRequest, match=message):
        list(read_vqa(tmp_path / "vqa.jsonl"))


def test_vqa_ids_are_unique(tmp_path: Path) -> None:
    line = '{"question": "x", "answer": "y", "id": 1}\n'
    (tmp_path / "vqa.jsonl").write_text(2 * line)
    with pytest.raises(InvalidRequest, match="line 2 has the id '1' of an earlier line"):
        list(read_vqa(tmp_path / "vqa.jsonl"))


def test_command_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", "none.jsonl"]) == 1
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    assert main(["--server", "127.0.0.1:9", "--examples", "1"]) == 1
    assert "127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--examples", "0"])
