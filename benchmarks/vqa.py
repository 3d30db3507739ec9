"""Questions with right answers: generated about the demo's scenes, or from a VQA-style JSONL file.

A line of such a file is an object with `question` (or `prompt`, or `messages`), `image` or `images`
(files, relative to the JSONL file), and `answer` or `answers`: a text or several that are all
right, or VQAv2's list of objects with an `answer`. Optional: `question_id`, `questionId` or `id`,
`kind` (a name; results are given for each), `videos`, `sampling_parameters`. Keys by which VQAv2,
TextVQA and DocVQA keep account of their questions are ignored; others are errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.questions import QuestionLine, parse_question, read_lines, wrong_value
from internvl_triton.errors import InvalidRequest
from internvl_triton.preprocessing import Request

__all__ = ["VqaQuestion", "read_vqa", "scene_questions"]

_NAMES = {
    "question": "prompt",
    "image": "images",
    "id": "question_id",
    "questionId": "question_id",
    "answers": "answer",
}
_ALLOWED = {
    *_NAMES, "prompt", "messages", "images", "videos", "sampling_parameters", "question_id", "kind",
    "answer",
}  # fmt: skip
_IGNORED = {
    "dataset", "source", "split", "data_split", "set_name", "metadata",
    "image_id", "image_width", "image_height", "image_classes", "docId", "ucsf_document_id",
    "ucsf_document_page_no", "flickr_original_url", "flickr_300k_url",
    "question_type", "question_types", "question_tokens", "answer_type", "multiple_choice_answer",
}  # fmt: skip


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


@dataclass(frozen=True)
class _VqaLine:
    """A checked line, its files not yet read."""

    id: str
    kind: str
    answers: tuple[str, ...]
    line: QuestionLine

    def question(self) -> VqaQuestion:
        files = [*self.line.images, *self.line.videos]
        return VqaQuestion(
            id=self.id,
            kind=self.kind,
            group=json.dumps(files) if files else self.id,
            text=self.line.prompt or "",
            request=self.line.request(),
            answers=self.answers,
        )


def read_vqa(path: Path) -> Iterator[VqaQuestion]:
    """Questions of a VQA-style JSONL file.

    The call checks all lines and that their files can be read; a picture is read when its
    question's turn comes.

    Raises InvalidRequest, with the line: not such a file, a missing picture, no answer.
    """
    path = Path(path)
    lines: dict[str, _VqaLine] = {}
    for fields, where in read_lines(path):
        line = _vqa_line(fields, path.parent, where)
        if line.id in lines:
            raise InvalidRequest(f"{where} has the id {line.id!r} of an earlier line")
        lines[line.id] = line
    return (line.question() for line in lines.values())


def _vqa_line(fields: Any, folder: Path, where: str) -> _VqaLine:
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{where} holds a {type(fields).__name__}; give one object a line")
    unknown = sorted(set(fields) - _ALLOWED - _IGNORED)
    if unknown:
        raise InvalidRequest(
            f"{where} has {unknown}; allowed: {', '.join(sorted(_ALLOWED))}; "
            f"ignored: {', '.join(sorted(_IGNORED))}"
        )
    given: dict[str, Any] = {}
    names = {"prompt": "question"}
    for name in fields:
        if name in _IGNORED or (name == "id" and "question_id" in fields):
            continue
        key = _NAMES.get(name, str(name))
        if key in given:
            both = f"{names[key]} and {name}"
            raise InvalidRequest(f"{where} gives one thing by two names: {both}; leave out one")
        given[key], names[key] = fields[name], name
    if "image_id" in fields and not given.keys() & {"images", "videos"}:
        raise InvalidRequest(
            f"{where} names its picture by image_id only; give its file as `image` as well"
        )
    identity = str(given.pop("question_id", where.rpartition(" ")[2]))
    kind = str(given.pop("kind", "all questions"))
    if "answer" not in given:
        raise InvalidRequest(f"{where} needs `answer`: a text, or a list of texts")
    answers = _answers(given.pop("answer"), names["answer"], where)
    return _VqaLine(identity, kind, answers, parse_question(given, folder, where, names))


def _answers(given: Any, key: str, where: str) -> tuple[str, ...]:
    texts = given if isinstance(given, list) else [given]
    texts = [text.get("answer") if isinstance(text, dict) else text for text in texts]
    if not texts or not all(isinstance(text, str) for text in texts):
        allowed = "a text, or a list of texts or of objects with a text as `answer`"
        raise wrong_value(where, key, given, allowed)
    return tuple(texts)
