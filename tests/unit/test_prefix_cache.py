"""Which beginnings of prompts are found again, and that answers do not change by it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import export_llm
from internvl_triton.cpu_llm import CpuLlmEngine
from internvl_triton.cpu_llm.kv_cache import KvCache
from internvl_triton.cpu_llm.prefix_cache import TOKENS_PER_BLOCK, PrefixCache
from internvl_triton.cpu_llm.transformer import Segment, Transformer
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from tests.unit.test_cpu_engine import Answer, ask, request

VOCAB = 1000
BLOCK = TOKENS_PER_BLOCK
BLOCK_BYTES = 2 * (1 * 2 * 1 * BLOCK * 2) * 4  # two ranks of one layer, one head of two numbers


def new_caches() -> list[KvCache]:
    return [KvCache(num_layers=1, num_kv_heads=1, head_dim=2) for _ in range(2)]


def keys_and_values(ids: np.ndarray, extra_ids: np.ndarray | None, rank: int) -> np.ndarray:
    """What a causal model would hold: numbers that depend on everything up to their position."""
    extras = np.zeros(len(ids)) if extra_ids is None else extra_ids.astype(float)
    so_far = np.cumsum((ids + 7 * extras + rank) * (1 + np.arange(len(ids)) % 13))
    values = np.stack([so_far, -so_far, so_far + 1, so_far + 2]).astype(np.float32)
    return values.reshape(2, 2, -1).transpose(0, 2, 1)[None, :, None]


def computed(ids: np.ndarray, extra_ids: np.ndarray | None = None) -> list[KvCache]:
    caches = new_caches()
    for rank, cache in enumerate(caches):
        cache.reserve(len(ids))
        cache.extend(keys_and_values(ids, extra_ids, rank))
    return caches


def store(prefixes: PrefixCache, ids: np.ndarray, extra_ids: np.ndarray | None = None) -> None:
    prefixes.store(ids, extra_ids, computed(ids, extra_ids))


def take(prefixes: PrefixCache, ids: np.ndarray, extra_ids: np.ndarray | None = None) -> int:
    """The tokens found, after a check that they are this prompt's."""
    caches = new_caches()
    found = prefixes.take(ids, extra_ids, caches)
    for rank, cache in enumerate(caches):
        assert cache.length == found
        expected = keys_and_values(ids, extra_ids, rank)[:, :, :, :found]
        np.testing.assert_array_equal(cache.copy(0, found), expected)
    return found


def text(*pieces: tuple[int, int]) -> np.ndarray:
    """(token, times) ... -> ids"""
    return np.concatenate([np.full(times, token) for token, times in pieces]).astype(np.int32)


def test_only_whole_blocks_are_found_and_never_the_last_token() -> None:
    prefixes = PrefixCache(2**20, vocab_size=VOCAB)
    ids = text((1, 3 * BLOCK + 5))
    assert take(prefixes, ids) == 0
    store(prefixes, ids)
    assert len(prefixes) == 3
    assert prefixes.num_bytes == 3 * BLOCK_BYTES
    for length, found in ((3 * BLOCK + 5, 3), (3 * BLOCK + 1, 3), (3 * BLOCK, 2), (BLOCK, 0)):
        assert take(prefixes, ids[:length]) == found * BLOCK, length


def test_a_block_is_known_only_behind_its_own_beginning() -> None:
    prefixes = PrefixCache(2**20, vocab_size=VOCAB)
    store(prefixes, text((1, BLOCK), (2, BLOCK)))
    assert take(prefixes, text((2, BLOCK), (9, 1))) == 0
    assert take(prefixes, text((1, BLOCK), (2, BLOCK), (9, 1))) == 2 * BLOCK
    assert take(prefixes, text((1, BLOCK), (1, BLOCK), (9, 1))) == BLOCK


def picture_prompt(extra_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Two blocks of text, two of a picture, and a question, with one extra id on the picture."""
    visual = np.arange(VOCAB, VOCAB + 2 * BLOCK)
    ids = np.concatenate([text((1, 2 * BLOCK)), visual, text((5, 3))]).astype(np.int32)
    return ids, np.where(ids >= VOCAB, np.uint64(extra_id), np.uint64(0))


def test_another_image_behind_the_same_text_is_not_found() -> None:
    prefixes = PrefixCache(2**20, vocab_size=VOCAB)
    store(prefixes, *picture_prompt(2**63 + 1))
    assert take(prefixes, *picture_prompt(2**63 + 1)) == 4 * BLOCK
    assert take(prefixes, *picture_prompt(2**63 + 2)) == 2 * BLOCK


@pytest.mark.parametrize("none", [True, False])
def test_an_image_without_an_extra_id_is_never_kept(none: bool) -> None:
    prefixes = PrefixCache(2**20, vocab_size=VOCAB)
    ids, extra_ids = picture_prompt(0)
    for _ in range(2):
        store(prefixes, ids, None if none else extra_ids)
        assert take(prefixes, ids, None if none else extra_ids) == 2 * BLOCK


def test_the_least_recently_used_prefix_goes_first_from_its_end() -> None:
    prefixes = PrefixCache(5 * BLOCK_BYTES, vocab_size=VOCAB)
    old, new = text((1, 3 * BLOCK + 1)), text((2, 2 * BLOCK + 1))
    store(prefixes, old)
    store(prefixes, new)
    assert take(prefixes, old) == 3 * BLOCK  # now the most recently used
    store(prefixes, text((3, BLOCK)))
    assert take(prefixes, new) == BLOCK
    assert take(prefixes, old) == 3 * BLOCK
    store(prefixes, text((4, 3 * BLOCK)))
    assert take(prefixes, old) == 2 * BLOCK


def test_a_prompt_beyond_the_budget_is_kept_from_its_beginning() -> None:
    prefixes = PrefixCache(3 * BLOCK_BYTES + 1, vocab_size=VOCAB)
    ids = text((1, 2 * BLOCK), (2, 8 * BLOCK))
    for _ in range(2):
        store(prefixes, ids)
        assert take(prefixes, ids) == 3 * BLOCK
    assert prefixes.num_bytes == 3 * BLOCK_BYTES


def test_nothing_fits_into_less_than_a_block() -> None:
    prefixes = PrefixCache(BLOCK_BYTES - 1, vocab_size=VOCAB)
    store(prefixes, text((1, BLOCK)))
    assert (len(prefixes), prefixes.num_bytes) == (0, 0)


def random_prompts(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompts of few kinds of blocks, so that many begin alike."""
    random = np.random.default_rng(seed)
    for _ in range(150):
        kinds = random.integers(0, 3, random.integers(1, 6))
        ids = np.concatenate([text((10 + kind, BLOCK)) for kind in kinds])
        ids[BLOCK - 1 :: BLOCK] += random.integers(0, 2, len(kinds))
        extra_ids = np.repeat(random.integers(0, 2, len(kinds)), BLOCK).astype(np.uint64)
        yield ids[: len(ids) - random.integers(0, BLOCK)].astype(np.int32), extra_ids


def common_blocks(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> int:
    """By comparing token by token."""
    tokens = 0
    for a, b in zip(
        *(zip(ids.tolist(), extras.tolist(), strict=False) for ids, extras in (one, other)),
        strict=False,
    ):
        if a != b:
            break
        tokens += 1
    return min(tokens, len(one[0]) - 1) // BLOCK


def test_every_prefix_seen_before_is_found() -> None:
    prefixes = PrefixCache(2**30, vocab_size=VOCAB)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for ids, extra_ids in random_prompts(1):
        extras = extra_ids[: len(ids)]
        longest = max((common_blocks((ids, extras), other) for other in seen), default=0)
        assert take(prefixes, ids, extras) == longest * BLOCK
        store(prefixes, ids, extras)
        seen.append((ids, extras))


@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_within_a_budget_only_true_prefixes_are_found(blocks: int) -> None:
    prefixes = PrefixCache(blocks * BLOCK_BYTES, vocab_size=VOCAB)
    found = 0
    for ids, extra_ids in random_prompts(blocks):
        found += take(prefixes, ids, extra_ids[: len(ids)])  # compares the contents
        store(prefixes, ids, extra_ids[: len(ids)])
        assert prefixes.num_bytes == len(prefixes) * BLOCK_BYTES <= blocks * BLOCK_BYTES
        kept = min(blocks, len(ids) // BLOCK) * BLOCK
        longer = np.append(ids, np.int32(1)), np.append(extra_ids[: len(ids)], np.uint64(0))
        assert take(prefixes, *longer) == kept
    assert found > 0


# --- in the engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2", "internlm2"])
def llm_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("prefix")
    source = write_random_checkpoint(
        root / "source", tiny_config(request.param, "300m"), seed=4, tokenizer=False
    )
    return export_llm(source, root / "tp2", tp_size=2, progress=False)


def new_engine(checkpoint: Path, prefix_cache_bytes: int) -> CpuLlmEngine:
    return CpuLlmEngine(
        checkpoint,
        max_batch_size=4,
        max_seq_len=2048,
        max_visual_tokens=256,
        max_queue_size=8,
        prefix_cache_bytes=prefix_cache_bytes,
    )


def conversation(
    engine: CpuLlmEngine, *, picture: int, streaming: bool = False
) -> tuple[list[Answer], list[int]]:
    """Three turns about one picture; each prompt is the last one, its answer and new text.

    Answers, and the tokens that were reused in each turn.
    """
    random = np.random.default_rng(picture)
    features = random.standard_normal((256, 256)).astype(np.float32)
    same = np.random.default_rng(0)  # text in front of and behind the picture
    ids = np.concatenate(
        [
            same.integers(3, 1200, 40),
            np.arange(engine.model.vocab_size, engine.model.vocab_size + 256),
        ]
    )
    answers, reused = [], []
    for _ in range(3):
        ids = np.concatenate([ids, same.integers(3, 1200, 30)]).astype(np.int32)
        extra_ids = np.where(ids >= engine.model.vocab_size, 77 + picture, 0).astype(np.uint64)
        before = engine.stats().reused_tokens
        asked: dict[str, Any] = {
            "prompt_embedding_table": features,
            "prompt_table_extra_ids": extra_ids,
            "return_log_probs": True,
            "streaming": streaming,
        }
        answers.append(ask(engine, request(ids.tolist(), 10, **asked)).wait())
        reused.append(engine.stats().reused_tokens - before)
        ids = np.concatenate([ids, answers[-1].tokens]).astype(np.int32)
    return answers, reused


@pytest.mark.parametrize("streaming", [True, False])
def test_answers_are_the_same_with_and_without_reuse(llm_checkpoint: Path, streaming: bool) -> None:
    plain, reusing = new_engine(llm_checkpoint, 0), new_engine(llm_checkpoint, 2**26)
    try:
        expected, nothing = conversation(plain, picture=1)
        answers, reused = conversation(reusing, picture=1, streaming=streaming)
        other, other_reused = conversation(reusing, picture=2)
        other_expected, _ = conversation(plain, picture=2)
    finally:
        plain.close()
        reusing.close()
    assert nothing == [0, 0, 0]
    # prompts of 326, 366 and 406 tokens; 335 and 375 of them were computed in the turn before
    assert reused == [0, 320, 352]
    assert other_reused == [32, 320, 352]  # of the first one, the text in front of the picture
    for turn, answer in zip([*expected, *other_expected], [*answers, *other], strict=True):
        assert answer.error == ""
        assert answer.tokens == turn.tokens
        assert answer.chunks[-1].log_probs == pytest.approx(turn.chunks[-1].log_probs, abs=1e-4)


def test_logits_behind_a_reused_prefix(llm_checkpoint: Path) -> None:
    model = Transformer.from_checkpoint(llm_checkpoint, max_seq_len=512)
    ids = np.random.default_rng(5).integers(3, 1200, 200).astype(np.int32)
    caches = model.new_caches()
    expected = model.logits(model.forward([Segment(ids, caches)]))[-20:]
    prefixes = PrefixCache(2**26, vocab_size=model.vocab_size)
    prefixes.store(ids[:180], None, caches)
    again = model.new_caches()
    found = prefixes.take(ids, None, again)
    assert found == 160
    logits = model.logits(model.forward([Segment(ids[found:], again)]))[-20:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


def test_a_stopped_request_leaves_what_it_computed(llm_checkpoint: Path) -> None:
    engine = new_engine(llm_checkpoint, 2**26)
    try:
        prompt = list(range(3, 103))
        answer = Answer()

        def stop_after_40(chunk: Any) -> None:
            answer(chunk)
            if len(answer.tokens) == 40:
                engine.stop("a")

        engine.submit(request(prompt, 1000, request_id="a", streaming=True), stop_after_40)
        answer.wait()
        again = ask(engine, request([*prompt, *answer.tokens], 1)).wait()
        assert again.error == ""
        assert engine.stats().reused_tokens == 128  # of 100 + 40, the last of which was not fed
        assert engine.stats().stopped == 1
    finally:
        engine.close()
