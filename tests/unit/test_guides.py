"""Whatever a random model prefers, its answer has the form that was asked for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export import export_llm
from internvl_triton.cpu_llm import CpuLlmEngine
from internvl_triton.errors import InvalidSampling
from internvl_triton.guides import (
    Guide,
    GuideCompiler,
    requested_guide,
    xgrammar_tokenizer_info,
)
from internvl_triton.model_spec import ModelSpec
from internvl_triton.sampling import SamplingParams
from internvl_triton.tokenizer import Tokenizer, load_tokenizer
from tests.unit.test_cpu_engine import Answer, ask, request

SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 300},
        "colour": {"enum": ["red", "grün", "白"]},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["count", "colour", "names"],
    "additionalProperties": False,
}


def check_schema(text: str) -> None:
    """By hand, what SCHEMA says."""
    answer = json.loads(text)
    assert answer.keys() == {"count", "colour", "names"}
    assert isinstance(answer["count"], int)
    assert 0 <= answer["count"] <= 300
    assert answer["colour"] in ("red", "grün", "白")
    assert len(answer["names"]) <= 2
    assert all(isinstance(name, str) and len(name) <= 4 for name in answer["names"])


@pytest.fixture(scope="module")
def engines(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[CpuLlmEngine, Tokenizer]]]:
    started = {}
    root = tmp_path_factory.mktemp("guided")
    for family, checkpoint in checkpoints.items():
        tokenizer = load_tokenizer(checkpoint)
        engine = CpuLlmEngine(
            export_llm(checkpoint, root / family, tp_size=1, progress=False),
            max_batch_size=4,
            max_seq_len=2048,
            max_visual_tokens=8,
            max_queue_size=32,
            tokenizer=tokenizer,
        )
        started[family] = engine, tokenizer
    yield started
    for engine, _ in started.values():
        engine.close()


def finished(answer: Answer) -> Answer:
    """A guided answer is longer than those that `Answer.wait` is made for."""
    assert answer._final.wait(300), "no final chunk"
    assert answer.error == ""
    return answer


def answers(
    engine: CpuLlmEngine, tokenizer: Tokenizer, guide: Guide, *, seeds: int = 4, **changes: Any
) -> list[str]:
    """Texts of a greedy request and sampled ones, all at once."""
    settings: list[dict[str, Any]] = [{"top_k": 1}]
    settings += [{"seed": seed, "temperature": 2.0, "top_p": 1.0} for seed in range(seeds)]
    running = [
        ask(
            engine,
            request(
                tokenizer.encode("Answer:"),
                800,
                end_id=tokenizer.end_id,
                guide=guide,
                **setting,
                **changes,
            ),
        )
        for setting in settings
    ]
    texts = []
    for answer in running:
        finished(answer)
        assert tokenizer.end_id not in answer.tokens
        texts.append(tokenizer.token_bytes.join(answer.tokens).decode())
    return texts


@pytest.mark.slow  # random models write much white space
@pytest.mark.parametrize("changes", [{}, {"repetition_penalty": 1.5, "frequency_penalty": 0.5}])
def test_json_of_a_schema(
    engines: dict[str, tuple[CpuLlmEngine, Tokenizer]], family: str, changes: dict[str, float]
) -> None:
    for text in answers(*engines[family], Guide.from_json_schema(SCHEMA), seeds=1, **changes):
        check_schema(text)


@pytest.mark.parametrize(
    "regex",
    [r"(yes|no), [A-Z][a-z]{2,8}\.", r"[0-9]{1,3}(\.[0-9]{2})? ?€", r"日本語*|[^\x00-\x7f]{3}"],
)
def test_a_regular_expression(
    engines: dict[str, tuple[CpuLlmEngine, Tokenizer]], family: str, regex: str
) -> None:
    texts = answers(*engines[family], Guide("regex", regex), seeds=6)
    for text in texts:
        assert re.fullmatch(regex, text), text
    assert len(set(texts)) > 1


def test_choices_are_texts_not_patterns(
    engines: dict[str, tuple[CpuLlmEngine, Tokenizer]], family: str
) -> None:
    choices = ["a.b", "(c|d)*", "e\\f [g] {h}", "a.b and more", "^$?+-#&~ \"'/\n%"]
    seen = set(answers(*engines[family], Guide.from_choices(choices), seeds=20))
    assert seen <= set(choices)
    assert len(seen) > 1
    for one in choices:  # the only one: the model has no say
        assert set(answers(*engines[family], Guide.from_choices([one]), seeds=1)) == {one}


def test_unguided_requests_beside_guided_ones_are_as_before(
    engines: dict[str, tuple[CpuLlmEngine, Tokenizer]],
) -> None:
    engine, tokenizer = engines["qwen2"]
    free = request(tokenizer.encode("Hello"), 20)
    alone = finished(ask(engine, free)).tokens
    guided = [
        ask(engine, request([5], 50, end_id=tokenizer.end_id, guide=Guide("regex", "a{5}b+")))
        for _ in range(3)
    ]
    assert finished(ask(engine, free)).tokens == alone
    for answer in guided:
        assert re.fullmatch("a{5}b*", tokenizer.token_bytes.join(finished(answer).tokens).decode())


def refused(engine: CpuLlmEngine, **changes: Any) -> str:
    answer: Answer = ask(engine, request([5], 5, **changes))
    assert answer.ended
    return answer.error


def test_guides_that_the_engine_refuses(
    engines: dict[str, tuple[CpuLlmEngine, Tokenizer]],
) -> None:
    engine, tokenizer = engines["qwen2"]
    end_id = tokenizer.end_id
    assert "unclosed group" in refused(engine, end_id=end_id, guide=Guide("regex", "(a"))
    assert "cannot be enforced" in refused(engine, end_id=end_id, guide=Guide("json_schema", "{"))
    assert "'lark'; the CPU engine has" in refused(engine, end_id=end_id, guide=Guide("lark", ""))
    assert f"with a guide it must be {end_id}" in refused(engine, guide=Guide("regex", "a"))
    assert ask(engine, request([5], 3)).wait().error == ""


# --- what a request asks for --------------------------------------------------------------------


def parameters(**values: Any) -> SamplingParams:
    return SamplingParams.from_json(json.dumps(values))


def test_requested_guides() -> None:
    assert requested_guide(parameters()) is None
    schema = {"type": "object"}
    assert requested_guide(parameters(guided_json=schema)) == Guide(
        "json_schema", '{"type": "object"}'
    )
    assert requested_guide(parameters(guided_regex="a+")) == Guide("regex", "a+")
    assert requested_guide(parameters(guided_choice=["a.", "ü|"])) == Guide("regex", r"(a\.)|(ü\|)")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guided_regex": "(a"}, r"guided_regex cannot be enforced: .*unclosed group"),
        ({"guided_regex": r"(a)\1"}, r"guided_regex cannot be enforced: .*backreferences"),
        ({"guided_json": {"type": "thing"}}, r"guided_json cannot be enforced: Invalid type"),
        ({"guided_json": {"not": {}}}, r"guided_json cannot be enforced: .*not"),
        ({"guided_json": "{}"}, r"guided_json is .*it must be a JSON schema such as"),
        ({"guided_regex": ""}, "guided_regex .* 1 to 4096 characters"),
        ({"guided_regex": 5}, "guided_regex is 5; it must be a string"),
        ({"guided_choice": "yes"}, "guided_choice .* a list of at most 256 strings"),
        ({"guided_choice": ["a", ""]}, "guided_choice .* strings of 1 to 1024 characters"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex .* because guided_json is given"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens is 3; it must be 0 with guided_regex"),
    ],
    ids=str,
)
def test_bad_guides_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSampling, match=message):
        requested_guide(parameters(**values))


# --- vocabularies -------------------------------------------------------------------------------


def test_special_tokens_are_never_allowed_inside(checkpoint: Path, tokenizer: Tokenizer) -> None:
    vocab_size = ModelSpec.from_checkpoint(checkpoint).llm.vocab_size
    compile_guide = GuideCompiler(tokenizer, vocab_size=vocab_size)
    matcher = compile_guide(Guide("regex", r"(.|\n)*"))
    allowed = matcher.allowed()
    assert allowed.shape == (vocab_size,)
    special = {token for token in range(vocab_size) if not tokenizer.token_bytes[token]}
    assert {token for token in special if allowed[token]} == {tokenizer.end_id}
    assert allowed.sum() > vocab_size // 2


def test_xgrammar_gets_the_bytes_of_every_token(checkpoint: Path, tokenizer: Tokenizer) -> None:
    vocab_size = ModelSpec.from_checkpoint(checkpoint).llm.vocab_size
    info = json.loads(json.dumps(xgrammar_tokenizer_info(tokenizer, vocab_size)))
    assert info["stop_token_ids"] == [tokenizer.end_id]
    assert json.loads(info["tokenizer_str"])["decoder"]["type"] == "ByteLevel"
    assert len(info["encoded_vocab"]) == vocab_size
    from tokenizers import decoders

    decoder = decoders.ByteLevel()
    for token, spelled in enumerate(info["encoded_vocab"]):
        expected = tokenizer.token_bytes[token].decode(errors="replace")
        assert decoder.decode([spelled]) == expected
