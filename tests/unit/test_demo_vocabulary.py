"""The demo's two tokenizers: texts survive, and both cut them at the same places."""

from __future__ import annotations

import random
import string
from collections import Counter
from pathlib import Path

import pytest

from demo.dialogue import EXAMPLE_KINDS, make_example
from demo.vocabulary import Vocabulary, demo_vocabulary, learn_pieces
from internvl_triton.prompt import DEFAULT_SYSTEM_MESSAGE
from internvl_triton.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return demo_vocabulary()


@pytest.fixture(scope="module")
def tokenizers(
    vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    qwen2, internlm2 = tmp_path_factory.mktemp("qwen2"), tmp_path_factory.mktemp("internlm2")
    vocabulary.write_qwen2(qwen2)
    vocabulary.write_internlm2(internlm2)
    return load_tokenizer(qwen2), load_tokenizer(internlm2)


def texts() -> list[str]:
    """Everything the demo says, and noise."""
    rng = random.Random(0)
    found = ["system\n" + DEFAULT_SYSTEM_MESSAGE, "\n", "Frame8: ", "Image-3: "]
    for kind in EXAMPLE_KINDS:
        for _ in range(30):
            for branch in make_example(rng, kind, tile_size=448).branches:
                for exchange in branch:
                    found += ["\n" + exchange.question, "assistant\n" + exchange.answer]
    alphabet = string.printable + "    eeaaoo"
    found += ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(500)]
    words = " ".join(found[:300]).split()
    found += [
        "".join(w[rng.randrange(len(w)) :] for w in rng.choices(words, k=6)) for _ in "x" * 500
    ]
    return found


def test_texts_survive_both_tokenizers(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in tokenizers:
        for text in [*texts(), "Grüße, 世界 🙂"]:
            assert tokenizer.token_bytes.join(tokenizer.encode(text)) == text.encode()


def test_ids_differ_only_by_the_table(
    vocabulary: Vocabulary, tokenizers: tuple[Tokenizer, Tokenizer]
) -> None:
    qwen2, internlm2 = tokenizers
    for text in texts():
        assert [vocabulary.qwen2_id[i] for i in internlm2.encode(text)] == qwen2.encode(text)
    for token in ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"):
        assert vocabulary.qwen2_id[internlm2.special_id(token)] == qwen2.special_id(token)


def test_the_table_is_one_to_one(vocabulary: Vocabulary) -> None:
    shared = [index for index in vocabulary.qwen2_id if index is not None]
    assert len(shared) == len(set(shared))
    assert len(vocabulary.qwen2_id) == len(vocabulary.internlm2_tokens)
    only_internlm2 = {
        token
        for token, index in zip(vocabulary.internlm2_tokens, vocabulary.qwen2_id, strict=True)
        if index is None
    }
    assert {"<unk>", "<s>", "</s>", "<0x20>"} <= only_internlm2
    assert len(only_internlm2) == 8


def test_every_word_of_the_demo_is_one_token(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    qwen2, _ = tokenizers
    assert len(qwen2.encode("The number is 42.")) == 7  # The, number, is, space, 4, 2, full stop
    assert len(qwen2.encode("system\n" + DEFAULT_SYSTEM_MESSAGE)) < 10


def test_learned_pieces_are_in_merge_order() -> None:
    # "ab" is in both words, then "abc"; ties go to the alphabetically first pair.
    assert learn_pieces(Counter({"abc": 2, "ab": 1})) == ["ab", "abc"]
    assert learn_pieces(Counter({"cd": 1, "ab": 1})) == ["ab", "cd"]


def test_the_vocabulary_is_always_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    assert demo_vocabulary() == vocabulary
