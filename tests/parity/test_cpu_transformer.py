"""Converted ranks against transformers' port: logits within 1e-3, greedy token ids identical."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from export import export_llm
from internvl_triton.cpu_llm import CpuLlmEngine
from internvl_triton.cpu_llm.attention import RotaryEmbedding, causal_attention
from internvl_triton.cpu_llm.kv_cache import KvCache
from internvl_triton.cpu_llm.rank_weights import LayerWeights, RankWeights, load_ranks
from internvl_triton.cpu_llm.transformer import Segment, Transformer
from internvl_triton.errors import ArtifactMismatch, EngineError
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from tests.oracle import Oracle

VOCAB = 1283  # divided by no TP but 1; 4 ranks pad it to 1284
TOKENS_PER_TILE = 256
ANSWER_TOKENS = 6
LOGITS_TOLERANCE = 1e-3
SAFE_MARGIN = 20 * LOGITS_TOLERANCE  # from best to second best, so that greedy ids mean something

COMBINATIONS = [
    pytest.param(("qwen2", "300m", 64), id="qwen2-300m-head64"),
    pytest.param(("qwen2", "6b", 128), id="qwen2-6b-head128"),
    pytest.param(("internlm2", "300m", 128), id="internlm2-300m-head128"),
    pytest.param(("internlm2", "6b", 64), id="internlm2-6b-head64"),
]
# Runs of text tokens (positive) and tiles (negative) that make a prompt.
PROMPTS = {
    "text-only": [57],
    "1-tile": [19, -1, 23],
    "13-tiles": [19, -13, 23],
    "3-images-two-turns": [11, -1, 5, -3, 29, -2, 17],
}


@dataclass
class Model:
    oracle: Oracle
    tp: dict[int, Transformer]
    directories: dict[int, Path]


@dataclass
class Prompt:
    """The same prompt for the oracle (image token ids and tiles) and for us (virtual ids)."""

    oracle_ids: list[int]
    tiles: np.ndarray
    ids: np.ndarray
    table: np.ndarray | None


@pytest.fixture(scope="session", params=COMBINATIONS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, vit, head_dim = request.param
    root = tmp_path_factory.mktemp(f"{family}-{vit}-{head_dim}")
    config = tiny_config(family, vit, head_dim=head_dim, num_heads=4, num_kv_heads=2)
    assert config["llm_config"]["vocab_size"] == VOCAB
    checkpoint = write_random_checkpoint(root / "checkpoint", config, seed=3)
    directories = {
        tp: export_llm(checkpoint, root / f"tp{tp}", tp_size=tp, progress=False) for tp in (1, 2, 4)
    }
    ranks = {
        tp: Transformer.from_checkpoint(directory, max_seq_len=4096)
        for tp, directory in directories.items()
    }
    return Model(Oracle(checkpoint), ranks, directories)


def make_prompt(oracle: Oracle, runs: list[int], seed: int) -> Prompt:
    random = np.random.default_rng(seed)
    oracle_ids: list[int] = []
    ids: list[int] = []
    rows = 0
    for run in runs:
        if run > 0:
            text = random.integers(3, VOCAB, run)
            text[text == oracle.image_token_id] = 3
            oracle_ids += text.tolist()
            ids += text.tolist()
        else:
            n = -run * TOKENS_PER_TILE
            oracle_ids += [oracle.image_token_id] * n
            ids += range(VOCAB + rows, VOCAB + rows + n)
            rows += n
    tiles = random.integers(0, 256, (rows // TOKENS_PER_TILE, 448, 448, 3), np.uint8)
    table = oracle.visual_features(tiles) if rows else None
    return Prompt(oracle_ids, tiles, np.array(ids, np.int32), table)


def all_logits(transformer: Transformer, prompt: Prompt, piece: int = 10**6) -> np.ndarray:
    """Logits of every position, the prompt fed in pieces of that many tokens."""
    caches = transformer.new_caches()
    return np.concatenate(
        [
            transformer.logits(
                transformer.forward(
                    [Segment(prompt.ids[start : start + piece], caches, prompt.table)]
                )
            )
            for start in range(0, len(prompt.ids), piece)
        ]
    )


def logits_and_answer(transformer: Transformer, prompt: Prompt) -> tuple[np.ndarray, list[int]]:
    """The greedy answer, and the logits of all positions of the prompt and of the answer."""
    caches = transformer.new_caches()
    logits = transformer.logits(transformer.forward([Segment(prompt.ids, caches, prompt.table)]))
    answer = [int(logits[-1].argmax())]
    while len(answer) < ANSWER_TOKENS:
        hidden = transformer.forward([Segment(np.array(answer[-1:], np.int32), caches)])
        logits = np.concatenate([logits, transformer.logits(hidden)])
        answer.append(int(logits[-1].argmax()))
    return logits, answer


@pytest.mark.parametrize("name", PROMPTS)
def test_parity(model: Model, name: str) -> None:
    """The oracle reads prompt and answer in one pass: if each of its choices is the answer's next
    token, then the answer is its greedy answer, and the margins are those of its choices.
    """
    prompt = make_prompt(model.oracle, PROMPTS[name], seed=len(name))
    # 3.4k tokens take seconds: there, two ranks are left to the shorter prompts
    tp_sizes = (1, 4) if name == "13-tiles" else (1, 2, 4)
    ours = {tp_size: logits_and_answer(model.tp[tp_size], prompt) for tp_size in tp_sizes}
    _, answer = ours[1]
    expected = model.oracle.logits(prompt.oracle_ids + answer[:-1], prompt.tiles)
    choices = expected[len(prompt.ids) - 1 :]
    runners_up, best = np.sort(choices, axis=1)[:, -2:].T
    assert (best - runners_up).min() > SAFE_MARGIN
    assert choices.argmax(axis=1).tolist() == answer
    for tp_size, (logits, own_answer) in ours.items():
        assert logits.shape == (len(prompt.ids) + ANSWER_TOKENS - 1, VOCAB)
        assert np.abs(logits - expected).max() < LOGITS_TOLERANCE, tp_size
        assert own_answer == answer, tp_size


def test_greedy_answer_is_that_of_the_oracles_own_loop(model: Model) -> None:
    prompt = make_prompt(model.oracle, PROMPTS["1-tile"], seed=2)
    answer, margin = model.oracle.greedy_with_margin(prompt.oracle_ids, prompt.tiles, ANSWER_TOKENS)
    assert margin > SAFE_MARGIN
    assert logits_and_answer(model.tp[2], prompt)[1] == answer


def test_prefill_in_pieces_is_the_same(model: Model) -> None:
    prompt = make_prompt(model.oracle, PROMPTS["1-tile"], seed=5)
    whole = all_logits(model.tp[2], prompt)
    np.testing.assert_allclose(all_logits(model.tp[2], prompt, 37), whole, atol=3e-4)


def test_sequences_of_one_step_do_not_mix(model: Model) -> None:
    transformer = model.tp[4]
    prompts = [make_prompt(model.oracle, [n], seed=n) for n in (5, 1, 33)]
    segments = [Segment(prompt.ids, transformer.new_caches()) for prompt in prompts]
    together = transformer.logits(transformer.forward(segments))
    alone = np.concatenate([all_logits(transformer, prompt) for prompt in prompts])
    np.testing.assert_allclose(together, alone, atol=1e-4)


# --- each known conversion mistake breaks parity ------------------------------------------------


def broken(
    transformer: Transformer, change: Callable[[int, LayerWeights], LayerWeights]
) -> Transformer:
    """A copy whose layers went through `change(rank, layer)`."""
    ranks = [
        RankWeights(
            rank.vocab_embedding,
            tuple(change(index, layer) for layer in rank.layers),
            rank.ln_f,
            rank.lm_head,
        )
        for index, rank in enumerate(transformer.ranks)
    ]
    return Transformer(transformer.spec, ranks, max_seq_len=4096)


def assert_breaks_parity(model: Model, transformer: Transformer) -> None:
    prompt = make_prompt(model.oracle, PROMPTS["text-only"], seed=1)
    expected = model.oracle.logits(prompt.oracle_ids)
    # far above the tolerance: at least a hundred times
    assert np.abs(all_logits(transformer, prompt) - expected).max() > 100 * LOGITS_TOLERANCE


def test_swapped_fc_and_gate_break_parity(model: Model) -> None:
    assert_breaks_parity(
        model, broken(model.tp[1], lambda rank, layer: replace(layer, fc=layer.gate, gate=layer.fc))
    )


def test_fused_qkv_chunked_as_one_matrix_breaks_parity(model: Model) -> None:
    """The shapes are the right ones, so only the numbers show it."""
    whole = model.tp[1].ranks[0].layers

    def chunk(rank: int, layer: LayerWeights) -> LayerWeights:
        index = next(i for i, own in enumerate(model.tp[2].ranks[rank].layers) if own is layer)
        qkv = np.split(whole[index].qkv, 2)[rank]
        assert qkv.shape == layer.qkv.shape
        bias = whole[index].qkv_bias
        return replace(layer, qkv=qkv, qkv_bias=None if bias is None else np.split(bias, 2)[rank])

    assert_breaks_parity(model, broken(model.tp[2], chunk))


def test_kv_heads_dealt_out_in_turn_break_parity(model: Model) -> None:
    """Rank r must hold head r // 2 of the two kv heads, not r % 2."""
    layers = [rank.layers for rank in model.tp[4].ranks]
    head_dim = model.tp[4].spec.head_dim

    def deal(rank: int, layer: LayerWeights) -> LayerWeights:
        index = next(i for i, own in enumerate(layers[rank]) if own is layer)
        other = layers[rank % 2 * 2][index]  # ranks 0 and 1 hold head 0, ranks 2 and 3 head 1
        bias = None
        if layer.qkv_bias is not None and other.qkv_bias is not None:
            bias = np.concatenate([layer.qkv_bias[:head_dim], other.qkv_bias[head_dim:]])
        qkv = np.concatenate([layer.qkv[:head_dim], other.qkv[head_dim:]])
        return replace(layer, qkv=qkv, qkv_bias=bias)

    assert_breaks_parity(model, broken(model.tp[4], deal))


def test_a_lost_partial_sum_breaks_parity(model: Model) -> None:
    def lose(rank: int, layer: LayerWeights) -> LayerWeights:
        return replace(layer, proj=np.zeros_like(layer.proj)) if rank == 1 else layer

    assert_breaks_parity(model, broken(model.tp[2], lose))


def test_swapped_vocabulary_shards_break_parity(model: Model) -> None:
    transformer = model.tp[4]
    ranks = [
        replace(rank, lm_head=other.lm_head)
        for rank, other in zip(transformer.ranks, reversed(transformer.ranks), strict=True)
    ]
    assert_breaks_parity(model, Transformer(transformer.spec, ranks, max_seq_len=4096))


# --- the prompt table ---------------------------------------------------------------------------


def test_virtual_ids_start_at_the_unpadded_vocabulary(model: Model) -> None:
    """With TP 4 the padded vocabulary is 1284: id 1283 must still be row 0 of the table."""
    table = np.random.default_rng(0).random((2, model.tp[4].hidden_size), np.float32)
    transformer = model.tp[4]
    token = transformer.ranks[0].vocab_embedding[7].astype(np.float32)
    embedded = transformer._embed(Segment(np.array([7, VOCAB, VOCAB + 1], np.int32), [], table))
    np.testing.assert_array_equal(embedded, np.stack([token, table[0], table[1]]))


@pytest.mark.parametrize(("rows", "message"), [(None, "which has 0 rows"), (2, "has 2 rows")])
def test_a_virtual_id_beyond_the_table(model: Model, rows: int | None, message: str) -> None:
    transformer = model.tp[1]
    table = None if rows is None else np.zeros((rows, transformer.hidden_size), np.float32)
    segment = Segment(np.array([VOCAB + 2], np.int32), transformer.new_caches(), table)
    with pytest.raises(EngineError, match=f"virtual token id 1285 selects row 2 of .*{message}"):
        transformer.forward([segment])


# --- files that do not fit ----------------------------------------------------------------------


@pytest.fixture
def artefact(model: Model, tmp_path: Path) -> Path:
    """A copy of the TP 2 checkpoint to spoil."""
    return Path(shutil.copytree(model.directories[2], tmp_path / "checkpoint"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_scaling": {"type": "dynamic", "factor": 2.0}}, "executes None only"),
        ({"use_parallel_embedding": True}, "use_parallel_embedding=True"),
        ({"architecture": "MedusaForCausalLM"}, "executes Qwen2ForCausalLM, InternLM2"),
        ({"vocab_size": 1285}, r"shape \(1283, .*config.json implies \(1285,"),
        ({"num_hidden_layers": 3}, r"lacks .* such as transformer\.layers\.2\."),
        ({"mapping": {"tp_size": 4, "world_size": 4}}, "config.json implies|lacks"),
        ({"mapping": {"tp_size": 2, "world_size": 4}}, "tensor parallelism only"),
        ({"mapping": {"tp_size": 3}}, "tp_size 3 cannot split this model"),
        ({"quantization": {"quant_algo": "FP8"}}, "has quant_algo 'FP8'"),
        ({"hidden_size": None}, "lacks a usable"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_executed(
    artefact: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(artefact, **changes)
    with pytest.raises(ArtifactMismatch, match=message):
        load_ranks(artefact)


def test_missing_and_broken_files(artefact: Path) -> None:
    rank = artefact / "rank1.safetensors"
    whole = rank.read_bytes()
    rank.write_bytes(whole[:-100])
    with pytest.raises(ArtifactMismatch, match="not a complete safetensors file"):
        load_ranks(artefact)
    rank.unlink()
    with pytest.raises(ArtifactMismatch, match=r"rank1\.safetensors is missing; convert"):
        load_ranks(artefact)
    (artefact / "config.json").write_text("{")
    with pytest.raises(ArtifactMismatch, match="not valid JSON"):
        load_ranks(artefact)
    (artefact / "config.json").unlink()
    with pytest.raises(
        ArtifactMismatch, match=r"has no config\.json: not a TensorRT-LLM checkpoint"
    ):
        load_ranks(artefact)


def test_ranks_of_different_models(artefact: Path, tmp_path: Path, model: Model) -> None:
    spec = model.tp[2].spec
    other = write_random_checkpoint(
        tmp_path / "other",
        tiny_config(spec.family, "300m", head_dim=spec.head_dim),
        seed=4,
        tokenizer=False,
    )
    export_llm(other, tmp_path / "tp2", tp_size=2, progress=False)
    shutil.copy(tmp_path / "tp2" / "rank1.safetensors", artefact / "rank1.safetensors")
    with pytest.raises(ArtifactMismatch, match="differs from rank 0's"):
        load_ranks(artefact)


def test_max_seq_len_beyond_the_trained_positions(artefact: Path) -> None:
    """Beyond, the reference would rescale InternLM2's positions, which this engine does not."""
    with pytest.raises(ArtifactMismatch, match="max_seq_len 32769 exceeds the model's 32768"):
        CpuLlmEngine(
            artefact, max_batch_size=1, max_seq_len=32769, max_visual_tokens=0, max_queue_size=0
        )


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 9), (7, 0), (5, 6)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_against_brute_force(
    new: int, past: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two query rows at a time
    monkeypatch.setattr("internvl_triton.cpu_llm.attention.MAX_SCORES", 2 * heads * (new + past))
    random = np.random.default_rng(0)
    queries = random.standard_normal((new, heads, 8), np.float32)
    keys, values = random.standard_normal((2, kv_heads, past + new, 8), np.float32)
    expected = np.zeros((new, heads, 8))
    for row in range(new):
        for head in range(heads):
            visible = past + row + 1
            own = head // (heads // kv_heads)
            scores = keys[own, :visible] @ queries[row, head] / np.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[row, head] = weights @ values[own, :visible]
    attended = causal_attention(queries, keys, values)
    np.testing.assert_allclose(attended, expected.reshape(new, -1), atol=1e-5)


def test_rotation_by_hand() -> None:
    # head_dim 4, theta 100: frequencies 1 and 0.1; pairs are (0, 2) and (1, 3)
    rotary = RotaryEmbedding(head_dim=4, theta=100.0, max_positions=8)
    x = np.array([[[1.0, 1.0, 0.0, 0.0]]], np.float32)
    rotated = rotary.rotate(x, np.array([3]))[0, 0]
    np.testing.assert_allclose(rotated, [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)], atol=1e-6)


def test_cache_grows_by_doubling_and_keeps_its_content() -> None:
    cache = KvCache(num_layers=1, num_kv_heads=2, head_dim=4, capacity=2)
    random = np.random.default_rng(0)
    everything = random.random((40, 2, 4), np.float32)
    capacities = []
    for row in everything:
        cache.reserve(cache.length + 1)
        keys, values = cache.append(0, row[None], -row[None])
        cache.advance(1)
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [2, 4, 8, 16, 32, 64]
    np.testing.assert_array_equal(keys, everything.transpose(1, 0, 2))
    np.testing.assert_array_equal(values, -keys)
