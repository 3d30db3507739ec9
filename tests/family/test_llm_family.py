"""All language models at their true widths: every tensor of every rank, against hand formulas."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from build.engines import build_engines
from build.servable import check_servable
from export import export_llm
from internvl_triton.artifacts import LLMBuild
from internvl_triton.published_models import PUBLISHED_MODELS, published_config
from internvl_triton.random_checkpoint import write_random_checkpoint
from internvl_triton.tiny_tokenizer import write_tiny_tokenizer
from tests.family.sizes import sizes, splits

pytestmark = pytest.mark.timeout(3600)

Table = dict[str, tuple[str, list[int]]]


def expected_table(llm: dict[str, Any], tp_size: int) -> Table:
    """Name -> (dtype, shape) of one rank. A linear weight is (out, in).

    Each rank has heads / TP query heads, and kv heads / TP of keys and of values, at least one;
    the rows of fc and gate and the columns of dense and proj are divided; the vocabulary of lm_head
    is divided and rounded up, that of the embedding is not divided.
    """
    hidden, heads = llm["hidden_size"], llm["num_attention_heads"]
    head = hidden // heads
    kv_heads = -(-llm["num_key_value_heads"] // tp_size)
    qkv = heads // tp_size * head + 2 * kv_heads * head
    inner = llm["intermediate_size"] // tp_size
    shapes = {
        "transformer.vocab_embedding.weight": [llm["vocab_size"], hidden],
        "transformer.ln_f.weight": [hidden],
        "lm_head.weight": [-(-llm["vocab_size"] // tp_size), hidden],
    }
    for number in range(llm["num_hidden_layers"]):
        layer = f"transformer.layers.{number}."
        shapes |= {
            f"{layer}input_layernorm.weight": [hidden],
            f"{layer}attention.qkv.weight": [qkv, hidden],
            f"{layer}attention.dense.weight": [hidden, hidden // tp_size],
            f"{layer}post_layernorm.weight": [hidden],
            f"{layer}mlp.fc.weight": [inner, hidden],
            f"{layer}mlp.gate.weight": [inner, hidden],
            f"{layer}mlp.proj.weight": [hidden, inner],
        }
        if llm["model_type"] == "qwen2":
            shapes[f"{layer}attention.qkv.bias"] = [qkv]
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def stored_table(path: Path) -> tuple[Table, int]:
    """What the header of a safetensors file says, and the bytes behind it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    table = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    ends = [entry["data_offsets"] for entry in header.values()]
    assert max(end for _, end in ends) == sum(end - begin for begin, end in ends)
    return table, path.stat().st_size - 8 - length


def num_bytes(table: Table) -> int:
    total = 0
    for _, shape in table.values():
        count = 1
        for side in shape:
            count *= side
        total += 2 * count
    return total


def check_ranks(directory: Path, llm: dict[str, Any], tp_size: int) -> None:
    expected = expected_table(llm, tp_size)
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["config.json", *(f"rank{rank}.safetensors" for rank in range(tp_size))]
    for rank in range(tp_size):
        table, data_bytes = stored_table(directory / f"rank{rank}.safetensors")
        assert table == expected
        assert data_bytes == num_bytes(expected)
    config = json.loads((directory / "config.json").read_text())
    qwen2 = llm["model_type"] == "qwen2"
    assert config["architecture"] == ("Qwen2ForCausalLM" if qwen2 else "InternLM2ForCausalLM")
    assert (config["dtype"], config["mapping"]["tp_size"]) == ("bfloat16", tp_size)
    assert config["mapping"]["world_size"] == tp_size
    for ours, theirs in (
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "num_hidden_layers"),
        ("num_attention_heads", "num_attention_heads"),
        ("num_key_value_heads", "num_key_value_heads"),
        ("intermediate_size", "intermediate_size"),
        ("vocab_size", "vocab_size"),
        ("rotary_base", "rope_theta"),
        ("norm_epsilon", "rms_norm_eps"),
    ):
        assert config[ours] == llm[theirs], ours


def test_the_table_by_hand() -> None:
    """78B on 8 ranks: 8 query heads and 1 kv head of 128 are 10 * 128 = 1280 rows of qkv; 29568 / 8
    = 3696; 151674 / 8 = 18959.25, so 18960 rows of lm_head."""
    table = expected_table(published_config("InternVL2_5-78B", llm_layers=1)["llm_config"], 8)
    layer = "transformer.layers.0."
    assert table[layer + "attention.qkv.weight"] == ("BF16", [1280, 8192])
    assert table[layer + "attention.dense.weight"] == ("BF16", [8192, 1024])
    assert table[layer + "mlp.proj.weight"] == ("BF16", [8192, 3696])
    assert table["lm_head.weight"] == ("BF16", [18960, 8192])
    # 4B on 4 ranks: 2 kv heads are fewer than ranks, so each has one: (4 + 2) * 128
    table = expected_table(published_config("InternVL2_5-4B", llm_layers=1)["llm_config"], 4)
    assert table[layer + "attention.qkv.bias"] == ("BF16", [768])


@pytest.mark.parametrize(("name", "tp_size"), splits(("InternVL2_5-1B", 2)))
def test_two_layers_at_every_tp_size(name: str, tp_size: int, scratch: Path) -> None:
    config = published_config(name, vision_layers=1, llm_layers=2)
    checkpoint = write_random_checkpoint(scratch / "c", config, zeros=True, tokenizer=False)
    output = export_llm(checkpoint, scratch / "llm", tp_size=tp_size, progress=False)
    check_ranks(output, config["llm_config"], tp_size)


@pytest.mark.parametrize("name", sizes(of=("InternVL2_5-1B", "InternVL2_5-2B")))
def test_a_whole_model_is_built_end_to_end(name: str, scratch: Path) -> None:
    """All layers, random weights, all steps of `make engines`; what is built can be served."""
    config = published_config(name)
    llm = config["llm_config"]
    checkpoint = write_random_checkpoint(scratch / name, config, tokenizer=False, shards=2)
    write_tiny_tokenizer(checkpoint, family=llm["model_type"], vocab_size=5000)
    artifacts = build_engines(
        str(checkpoint),
        tp_size=2,
        profile="cpu",
        artifacts_dir=scratch / "artifacts",
        progress=False,
    )
    build = LLMBuild("bf16", 2)
    check_servable(artifacts, build)
    check_ranks(artifacts.llm_checkpoint(build), llm, 2)
    assert PUBLISHED_MODELS[name][1]["num_hidden_layers"] == 24
