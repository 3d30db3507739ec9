"""The benchmark of quantised weights: its arithmetic on a small model, and its questions."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.precision_agreement import Agreement, Prompt, compare, main, report
from benchmarks.questions import Question, read_questions
from export import export_llm
from internvl_triton.cpu_llm.transformer import Segment, Transformer
from internvl_triton.errors import InvalidRequest
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.tokenizer import Tokenizer, load_tokenizer

PRECISIONS = ("bf16", "int8", "int4")
MAX_TOKENS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen2", "300m", llm_layers=1)
    return write_random_checkpoint(tmp_path_factory.mktemp("benchmark") / "checkpoint", config)


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> dict[str, Transformer]:
    found = {}
    for precision in PRECISIONS:
        directory = checkpoint.parent / precision
        export_llm(checkpoint, directory, tp_size=1, precision=precision, progress=False)
        found[precision] = Transformer.from_checkpoint(directory, max_seq_len=128)
    return found


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def prompts(models: dict[str, Transformer]) -> list[Prompt]:
    random = np.random.default_rng(0)
    table = random.standard_normal((4, 256)).astype(np.float32)
    virtual = np.arange(1283, 1287, dtype=np.int32)
    return [
        Prompt(np.concatenate([virtual, random.integers(3, 1200, 9).astype(np.int32)]), table)
        for _ in range(4)
    ]


def greedy(model: Transformer, prompt: Prompt) -> tuple[list[int], np.ndarray]:
    """Without a cache: the whole prompt again for every token."""
    ids, rows = list(prompt.input_ids), []
    for _ in range(MAX_TOKENS):
        segment = Segment(np.array(ids, np.int32), model.new_caches(), prompt.table)
        rows.append(model.logits(model.forward([segment]))[-1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(prompt.input_ids) :], np.stack(rows)


def test_numbers_against_a_second_way(
    models: dict[str, Transformer], prompts: list[Prompt], tokenizer: Tokenizer
) -> None:
    rows = compare(models, prompts, tokenizer, max_tokens=MAX_TOKENS)
    assert [row.precision for row in rows] == list(PRECISIONS)
    first = [greedy(models["bf16"], prompt) for prompt in prompts]
    assert all(tokenizer.end_id not in answer for answer, _ in first)
    for row in rows:
        model = models[row.precision]
        read = []
        for prompt, (answer, _) in zip(prompts, first, strict=True):
            ids = np.array([*prompt.input_ids, *answer[:-1]], np.int32)
            hidden = model.forward([Segment(ids, model.new_caches(), prompt.table)])
            read.append(model.logits(hidden)[-MAX_TOKENS:])
        ours, theirs = np.concatenate(read), np.concatenate([logits for _, logits in first])
        assert row.tokens == len(ours) == 4 * MAX_TOKENS
        assert row.same_tokens == sum(
            int(a.argmax()) == int(b.argmax()) for a, b in zip(ours, theirs, strict=True)
        )
        own = [greedy(model, prompt)[0] for prompt in prompts]
        assert row.same_answers == sum(a == b for a, (b, _) in zip(own, first, strict=True))
        error = (ours - ours.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))
        assert row.rms_error == pytest.approx(np.sqrt((error**2).mean()), abs=1e-4)
        assert row.max_error == pytest.approx(np.abs(error).max(), abs=1e-3)
        assert (row.expected, row.right) == (0, 0)
    bf16, int8, int4 = rows
    assert (bf16.same_tokens, bf16.same_answers, bf16.max_error) == (20, 4, 0.0)
    assert 0 < int8.rms_error < int4.rms_error
    # float32, or integers and a float32 scale per output
    matrices = [(512, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    weights, outputs = sum(a * b for a, b in matrices), sum(a for a, _ in matrices)
    assert bf16.weight_bytes == 4 * weights
    assert int8.weight_bytes == weights + 4 * outputs
    assert int4.weight_bytes == weights // 2 + 4 * outputs


def test_right_answers_are_counted(
    models: dict[str, Transformer], prompts: list[Prompt], tokenizer: Tokenizer
) -> None:
    answer, _ = greedy(models["bf16"], prompts[0])
    text = tokenizer.token_bytes.join(answer).decode(errors="replace")
    asked = [
        Prompt(prompts[0].input_ids, prompts[0].table, f" {text}\n"),  # white space does not count
        Prompt(prompts[1].input_ids, prompts[1].table, "something else"),
        prompts[2],
    ]
    (row,) = compare({"bf16": models["bf16"]}, asked, tokenizer, max_tokens=MAX_TOKENS)
    assert (row.answers, row.expected, row.right) == (3, 2, 1)


def test_an_answer_ends_at_the_end_token(
    models: dict[str, Transformer], prompts: list[Prompt], tokenizer: Tokenizer
) -> None:
    class EndsEarly:
        end_id = greedy(models["bf16"], prompts[0])[0][1]
        token_bytes = tokenizer.token_bytes

    (row,) = compare({"bf16": models["bf16"]}, prompts[:1], EndsEarly(), max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    assert row.tokens == 2


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Agreement("bf16", 4_000_000, 40, 40, 8, 8, 4, 4, 0.0, 0.0),
        Agreement("int4", 500_000, 40, 30, 8, 2, 4, 3, 0.125, 1.5),
    ]
    report(rows, "demo")
    printed = capsys.readouterr().out
    for text in ("8 questions, 40 tokens", "0.50", "75.0 %", "25.0 %", "0.1250", "1.500"):
        assert text in printed


# --- questions ----------------------------------------------------------------------------------


def test_questions_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    lines = [
        {"prompt": "What?", "images": ["a.png"], "answer": "A star."},
        {"messages": [{"role": "user", "content": "Hi"}], "sampling_parameters": {"max_tiles": 1}},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_questions(file)
    assert (first.request.text_input, first.request.images, first.answer) == (
        "What?",
        [b"png"],
        "A star.",
    )
    assert isinstance(second, Question)
    assert json.loads(second.request.messages or "") == lines[1]["messages"]
    assert json.loads(second.request.sampling_parameters or "") == {"max_tiles": 1}
    assert second.answer is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "questions.jsonl, line 1 is not valid JSON"),
        ('["What?"]', "line 1 has list; allowed: answer, images, messages, prompt"),
        ('{"question": "What?"}', r"line 1 has \['question'\]; allowed"),
        ('{"answer": "x"}', "line 1 must have exactly one of prompt and messages"),
        ('{"prompt": "x", "images": ["no.png"]}', r"line 1 names no\.png, which cannot be read"),
        ("", "holds no question"),
    ],
)
def test_what_is_no_question(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(line)
    with pytest.raises(InvalidRequest, match=message):
        read_questions(tmp_path / "questions.jsonl")


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--questions", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl cannot be read: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--count", "0"])
