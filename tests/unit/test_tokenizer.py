"""Tokenizers against the reference's, and bytes of tokens against decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from internvl_triton.errors import IncompleteCheckpoint, InvalidCheckpoint
from internvl_triton.prompt import DEFAULT_SYSTEM_MESSAGE
from internvl_triton.tiny_tokenizer import write_tiny_tokenizer
from internvl_triton.tokenizer import Tokenizer, load_tokenizer
from tests.real_qwen import write_qwen_tokenizer

TEXTS = [
    "Hello, who are you?",
    "  leading and trailing  ",
    "数一数圆形的数量🙂",
    "line\n\n\nbreaks\t\ttabs\r\n",
    "1234 don't I'LL x²+√y <b>",
    DEFAULT_SYSTEM_MESSAGE,
]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_ids_are_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes.join(ids) == text.encode()
    one_by_one = b"".join(tokenizer.token_bytes[i] for i in ids)
    assert one_by_one == text.encode()


def test_special_tokens_show_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_id(token) for token in ("<|im_end|>", "<img>", "<ref>", "</box>")]
    assert tokenizer.token_bytes.join(ids) == b""
    assert tokenizer.token_bytes.join([10**6, -1]) == b""


def test_the_table_covers_the_vocabulary(tokenizer: Tokenizer, spec) -> None:
    assert len(tokenizer) == spec.llm.vocab_size


def test_added_tokens_that_are_not_special_are_text(checkpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["qwen2"], tmp_path / "copy")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    index = next(i for i, e in config["added_tokens_decoder"].items() if e["content"] == "<quad>")
    config["added_tokens_decoder"][index] |= {"content": "<tool_call>", "special": False}
    path.write_text(json.dumps(config))
    added = json.loads((directory / "added_tokens.json").read_text())
    del added["<quad>"]
    (directory / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<tool_call>") == [int(index)]
    assert tokenizer.token_bytes[int(index)] == b"<tool_call>"


def test_tokenizer_json_alone_gives_the_same_ids(checkpoints, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    directory = tmp_path / "fast"
    Qwen2Tokenizer.from_pretrained(checkpoints["qwen2"]).save_pretrained(directory)
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink(missing_ok=True)
    slow, fast = load_tokenizer(checkpoints["qwen2"]), load_tokenizer(directory)
    for text in TEXTS:
        assert fast.encode(text) == slow.encode(text)
        assert fast.token_bytes.join(fast.encode(text)) == text.encode()
    assert fast.end_id == slow.end_id


def test_missing_and_broken_files(checkpoints, tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpoint, match=r"neither tokenizer\.model"):
        load_tokenizer(tmp_path)
    broken = shutil.copytree(checkpoints["qwen2"], tmp_path / "broken")
    (broken / "vocab.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match=r"vocab\.json is not valid JSON"):
        load_tokenizer(broken)
    broken = shutil.copytree(checkpoints["internlm2"], tmp_path / "sp")
    (broken / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InvalidCheckpoint, match="not a SentencePiece model"):
        load_tokenizer(broken)
    plain = shutil.copytree(checkpoints["qwen2"], tmp_path / "plain")
    (plain / "added_tokens.json").unlink()
    (plain / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"not an InternVL2\.5 tokenizer"):
        load_tokenizer(plain)


def test_real_qwen_vocabulary(tmp_path: Path) -> None:
    """Facts about the published vocabulary: 37 tokens of system block, 310 for one tile."""
    write_qwen_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 151674
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    assert (start, end, tokenizer.special_id("<IMG_CONTEXT>")) == (151644, 151645, 151667)
    block = [start, *tokenizer.encode("system\n" + DEFAULT_SYSTEM_MESSAGE), end]
    block += tokenizer.encode("\n")
    assert block[:3] == [151644, 8948, 198]
    assert len(block) == 37
    question = [start, *tokenizer.encode("user\n"), *[0] * 258]
    question += [*tokenizer.encode("\nPlease describe the image shortly."), end]
    question += [*tokenizer.encode("\n"), start, *tokenizer.encode("assistant\n")]
    assert len(block) + len(question) == 310  # 256 + 54


def test_a_made_up_vocabulary_of_true_size(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, family="internlm2", vocab_size=92_553)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_bytes.join(tokenizer.encode("a b 数")) == "a b 数".encode()
