"""Questions with right answers: generated about the demo's scenes, or from a VQA-style JSONL file.

A line of such a file is an object with `question` (or `prompt`, or `messages`), `image` or `images`
(files, relative to the JSONL file), and `answer` or `answers`, a text or several that are all
right. Optional: `question_id` or `id`, `kind` (a name; results are given for each), `videos`,
`sampling_parameters`. So the files of TextVQA, DocVQA, ChartQA and others in that form can be used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.questions import Question, parse_question, read_lines
from internvl_triton.errors import InvalidRequest
from internvl_triton.preprocessing import Request

__all__ = ["VqaQuestion", "read_vqa", "scene_questions"]

_NAMES = {"question": "prompt", "image": "images", "id": "question_id", "answers": "answer"}


@dataclass(frozen=True)
class VqaQuestion:
    """One question. `group`: questions of one group are about the same pictures."""

    id: str
    kind: str
    group: str
    text: str
    request: Request
    answers: tuple[str, ...]


def scene_questions(num_examples: int, *, seed: int = 0) -> Iterator[VqaQuestion]:
    """The last question of every branch of the demo's evaluation examples, in a fixed order."""
    from demo import evaluation_examples, service_request

    for number, example in enumerate(evaluation_examples(num_examples, seed=seed)):
        for branch_number, branch in enumerate(example.branches):
            asked = service_request(example, branch)
            last = branch[-1]
            yield VqaQuestion(
                id=f"scenes-{seed}-{number}-{branch_number}",
                kind=last.kind,
                group=f"scenes-{seed}-{number}",
                text=last.question,
                request=Request(
                    messages=asked.messages,
                    images=asked.images,
                    videos=asked.videos,
                    sampling_parameters=json.dumps(asked.sampling_parameters),
                ),
                answers=(last.answer,),
            )


def read_vqa(path: Path) -> Iterator[VqaQuestion]:
    """Questions of a VQA-style JSONL file; a picture is read when its question's turn comes.

    Raises InvalidRequest, with the line: not such a file, a missing picture, no answer.
    """
    path = Path(path)
    seen: set[str] = set()
    for fields, where in read_lines(path):
        question = _vqa_question(fields, path.parent, where)
        if question.id in seen:
            raise InvalidRequest(f"{where} has the id {question.id!r} of an earlier line")
        seen.add(question.id)
        yield question


def _vqa_question(fields: Any, folder: Path, where: str) -> VqaQuestion:
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{where} holds a {type(fields).__name__}; give one object a line")
    given = {_NAMES.get(name, name): value for name, value in fields.items()}
    if len(given) < len(fields):
        raise InvalidRequest(f"{where} gives one thing by two names: {', '.join(sorted(fields))}")
    identity = str(given.pop("question_id", where.rpartition(" ")[2]))
    kind = str(given.pop("kind", "all questions"))
    answers = given.pop("answer", None)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise InvalidRequest(f"{where} needs `answer`: a text, or a list of texts")
    if isinstance(given.get("images"), str):
        given["images"] = [given["images"]]
    files = [*given.get("images", []), *given.get("videos", [])]
    question: Question = parse_question(given, folder, where)
    return VqaQuestion(
        id=identity,
        kind=kind,
        group=json.dumps(files) if files else identity,
        text=str(given.get("prompt", "")),
        request=question.request,
        answers=tuple(answers),
    )
