"""The TensorRT-LLM checkpoint: names, dtypes, shapes, config fields, and failures."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from export import export_llm
from export.llm_checkpoint import main
from internvl_triton.cpu_llm.rank_layout import rank_shapes
from internvl_triton.errors import (
    BuildFailed,
    IncompleteCheckpoint,
    InvalidCheckpoint,
    InvalidTensorParallel,
)
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

ROOT = Path(__file__).parents[2]
HAND_TABLE = {
    # (model, tp): qkv rows, dense inputs, fc rows, lm_head rows of one rank; from the model cards'
    # heads, kv heads, head_dim, intermediate size and vocabulary
    ("InternVL2_5-1B", 1): ((14 + 2 * 2) * 64, 14 * 64, 4864, 151674),
    ("InternVL2_5-1B", 2): ((7 + 2 * 1) * 64, 7 * 64, 2432, 75837),
    ("InternVL2_5-2B", 8): ((2 + 2 * 1) * 128, 2 * 128, 1024, 11570),  # 92553 -> 92560
    ("InternVL2_5-4B", 2): ((8 + 2 * 1) * 128, 8 * 128, 5504, 75837),
    ("InternVL2_5-4B", 4): ((4 + 2 * 1) * 128, 4 * 128, 2752, 37919),  # 151674 -> 151676
    ("InternVL2_5-4B", 8): ((2 + 2 * 1) * 128, 2 * 128, 1376, 18960),  # 151674 -> 151680
    ("InternVL2_5-8B", 1): ((32 + 2 * 8) * 128, 4096, 14336, 92553),
    ("InternVL2_5-8B", 4): ((8 + 2 * 2) * 128, 1024, 3584, 23139),  # 92553 -> 92556
    ("InternVL2_5-26B", 2): ((24 + 2 * 4) * 128, 3072, 8192, 46277),  # 92553 -> 92554
    ("InternVL2_5-38B", 8): ((5 + 2 * 1) * 128, 640, 3456, 18960),
    ("InternVL2_5-78B", 4): ((16 + 2 * 2) * 128, 2048, 7392, 37919),
    ("InternVL2_5-78B", 8): ((8 + 2 * 1) * 128, 1024, 3696, 18960),
}
VALID_TP = dict.fromkeys(PUBLISHED_MODELS, (1, 2, 4, 8)) | {"InternVL2_5-1B": (1, 2)}
PUBLISHED = [(name, tp) for name, sizes in VALID_TP.items() for tp in sizes]


def expected_shapes(config: dict[str, Any], tp: int) -> dict[str, tuple[int, ...]]:
    """The table of TensorRT-LLM's tensors, computed from config.json alone."""
    llm = config["llm_config"]
    hidden, vocab = llm["hidden_size"], llm["vocab_size"]
    heads, kv = llm["num_attention_heads"], llm["num_key_value_heads"]
    head_dim, inner = hidden // heads, llm["intermediate_size"]
    qkv = (heads // tp + 2 * ((kv + tp - 1) // tp)) * head_dim  # (kv+tp-1)//tp: the run time's rule
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.vocab_embedding.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": ((vocab + tp - 1) // tp, hidden),
    }
    for layer in range(llm["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm.weight": (hidden,),
            "post_layernorm.weight": (hidden,),
            "attention.qkv.weight": (qkv, hidden),
            "attention.dense.weight": (hidden, heads // tp * head_dim),
            "mlp.fc.weight": (inner // tp, hidden),
            "mlp.gate.weight": (inner // tp, hidden),
            "mlp.proj.weight": (hidden, inner // tp),
        }.items():
            shapes[f"transformer.layers.{layer}.{name}"] = shape
        if llm["architectures"] == ["Qwen2ForCausalLM"]:
            shapes[f"transformer.layers.{layer}.attention.qkv.bias"] = (qkv,)
    return shapes


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """The same heads and vocabulary remainders, small enough to write: head_dim 8."""
    llm = config["llm_config"]
    small = {
        "hidden_size": llm["num_attention_heads"] * 8,
        "intermediate_size": llm["intermediate_size"] // 16,
        "vocab_size": 800 + llm["vocab_size"] % 8,
    }
    vision = {**config["vision_config"], "hidden_size": 25 * 16, "intermediate_size": 64}
    vision["num_attention_heads"] = 25
    return {**config, "llm_config": {**llm, **small}, "vision_config": vision}


def read(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen2")
    return write_random_checkpoint(directory, tiny_config("qwen2", "300m"), tokenizer=False)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("internlm2")
    return write_random_checkpoint(directory, tiny_config("internlm2", "6b"), tokenizer=False)


@pytest.mark.parametrize(("model", "tp_size"), PUBLISHED)
def test_shapes_of_the_published_sizes(model: str, tp_size: int) -> None:
    config = published_config(model, llm_layers=2)
    shapes = rank_shapes(ModelSpec.from_config(config).llm, tp_size)
    assert shapes == expected_shapes(config, tp_size)


@pytest.mark.parametrize(("model", "tp_size"), HAND_TABLE)
def test_shapes_against_hand_arithmetic(model: str, tp_size: int) -> None:
    shapes = rank_shapes(ModelSpec.from_config(published_config(model)).llm, tp_size)
    last = f"transformer.layers.{published_config(model)['llm_config']['num_hidden_layers'] - 1}."
    assert (
        shapes[last + "attention.qkv.weight"][0],
        shapes[last + "attention.dense.weight"][1],
        shapes[last + "mlp.fc.weight"][0],
        shapes["lm_head.weight"][0],
    ) == HAND_TABLE[model, tp_size]


@pytest.mark.parametrize("model", PUBLISHED_MODELS)
def test_rank_files_of_the_published_head_counts(model: str, tmp_path: Path) -> None:
    config = narrow(published_config(model, vision_layers=1, llm_layers=2))
    checkpoint = write_random_checkpoint(
        tmp_path / "source", config, zeros=True, tokenizer=False, shards=3
    )
    for tp_size in VALID_TP[model]:
        output = export_llm(checkpoint, tmp_path / f"tp{tp_size}", tp_size=tp_size, progress=False)
        files = sorted(path.name for path in output.iterdir())
        assert files == ["config.json", *(f"rank{rank}.safetensors" for rank in range(tp_size))]
        for rank in range(tp_size):
            tensors = read(output / f"rank{rank}.safetensors")
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            assert shapes == expected_shapes(config, tp_size)
            assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_1b_at_its_real_width(tmp_path: Path) -> None:
    config = published_config("InternVL2_5-1B", vision_layers=1, llm_layers=1)
    checkpoint = write_random_checkpoint(tmp_path / "c", config, zeros=True, tokenizer=False)
    output = export_llm(checkpoint, tmp_path / "out", tp_size=2, progress=False)
    with safe_open(output / "rank1.safetensors", framework="np") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert shapes == expected_shapes(config, 2)


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_every_weight_arrives_where_it_belongs(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(family)
    source = read(checkpoint / "model.safetensors")
    output = export_llm(checkpoint, tmp_path / "tp4", tp_size=4, progress=False)
    ranks = [read(output / f"rank{rank}.safetensors") for rank in range(4)]
    layer = "language_model.model.layers.1."
    target = "transformer.layers.1."
    names = {  # facts: fc gets the SiLU, so it is gate_proj = w1; gate is up_proj = w3
        "fc": "mlp.gate_proj" if family == "qwen2" else "feed_forward.w1",
        "gate": "mlp.up_proj" if family == "qwen2" else "feed_forward.w3",
        "proj": "mlp.down_proj" if family == "qwen2" else "feed_forward.w2",
    }
    for ours, theirs in names.items():
        joined = np.concatenate(
            [rank[f"{target}mlp.{ours}.weight"] for rank in ranks], axis=1 if ours == "proj" else 0
        )
        np.testing.assert_array_equal(joined, source[f"{layer}{theirs}.weight"])
    head = "lm_head" if family == "qwen2" else "output"
    padded = np.concatenate([rank["lm_head.weight"] for rank in ranks])
    np.testing.assert_array_equal(padded[:1283], source[f"language_model.{head}.weight"])
    assert len(padded) == 1284
    assert not padded[1283:].astype(np.float32).any()
    for name in ("transformer.vocab_embedding.weight", "transformer.ln_f.weight"):
        assert all(np.array_equal(rank[name], ranks[0][name]) for rank in ranks)


def test_kv_heads_are_duplicated_for_four_ranks(qwen2: Path, tmp_path: Path) -> None:
    # 4 heads, 2 kv heads, head_dim 64: a rank's rows are q (64), k (64), v (64)
    source = read(qwen2 / "model.safetensors")
    prefix = "language_model.model.layers.0.self_attn."
    output = export_llm(qwen2, tmp_path / "tp4", tp_size=4, progress=False)
    for rank, kv_head in enumerate([0, 0, 1, 1]):
        tensors = read(output / f"rank{rank}.safetensors")
        for kind in ("weight", "bias"):
            qkv = tensors[f"transformer.layers.0.attention.qkv.{kind}"]
            for index, (letter, head) in enumerate((("q", rank), ("k", kv_head), ("v", kv_head))):
                expected = source[f"{prefix}{letter}_proj.{kind}"][head * 64 : head * 64 + 64]
                np.testing.assert_array_equal(qkv[index * 64 : index * 64 + 64], expected)


# Keys of MODEL_MAP in tensorrt_llm/models/__init__.py for the classes QWenForCausalLM and
# LLaMAForCausalLM; `trtllm-build` ends with a KeyError for any other name. Of NVIDIA's converters,
# qwen's and internlm2's write these.
@pytest.mark.parametrize(
    ("family", "architecture"),
    [("qwen2", "Qwen2ForCausalLM"), ("internlm2", "InternLM2ForCausalLM")],
)
def test_config_fields(
    family: str, architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(family)
    output = export_llm(checkpoint, tmp_path / "tp2", tp_size=2, progress=False)
    config = json.loads((output / "config.json").read_text())
    qwen2 = family == "qwen2"
    assert (
        config.items()
        >= {
            "architecture": architecture,
            "dtype": "bfloat16",
            "logits_dtype": "float32",
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_size": 64,
            "rotary_embedding_dim": 64,
            "intermediate_size": 512,
            "vocab_size": 1283,  # unpadded: virtual token ids start there
            "hidden_act": "silu",
            "norm_epsilon": 1e-6 if qwen2 else 1e-5,
            "position_embedding_type": "rope_gpt_neox",
            "max_position_embeddings": 32768,
            "rotary_base": 1e6,
            "rotary_scaling": None,  # although InternLM2's config.json says dynamic
            "attn_bias": qwen2,
            "mlp_bias": False,
            "use_parallel_embedding": False,
            "embedding_sharding_dim": 0,
            "tie_word_embeddings": False,
        }.items()
    )
    assert config["mapping"] == {
        "world_size": 2,
        "tp_size": 2,
        "pp_size": 1,
        "cp_size": 1,
        "moe_tp_size": 2,
        "moe_ep_size": 1,
        "gpus_per_node": 8,
    }
    assert config["quantization"]["quant_algo"] is None
    assert config["quantization"]["kv_cache_quant_algo"] is None
    assert config.get("qwen_type") == ("qwen2" if qwen2 else None)
    assert config.get("residual_mlp") == (None if qwen2 else False)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")],
)
def test_precision(precision: Any, dtype: str, internlm2: Path, tmp_path: Path) -> None:
    output = export_llm(internlm2, tmp_path / "out", tp_size=1, precision=precision, progress=False)
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    fc = read(output / "rank0.safetensors")["transformer.layers.0.mlp.fc.weight"]
    assert fc.dtype == np.dtype(dtype if precision != "bf16" else ml_dtypes.bfloat16)
    w1 = read(internlm2 / "model.safetensors")[
        "language_model.model.layers.0.feed_forward.w1.weight"
    ]
    np.testing.assert_allclose(fc.astype(np.float32), w1.astype(np.float32), rtol=1e-3, atol=1e-7)


def test_a_value_beyond_fp16_is_refused(internlm2: Path, tmp_path: Path) -> None:
    from internvl_triton.checkpoint_layout import checkpoint_shapes
    from internvl_triton.safetensors_file import SafetensorsWriter

    config = json.loads((internlm2 / "config.json").read_text())
    checkpoint = tmp_path / "large"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    layout = checkpoint_shapes(ModelSpec.from_config(config))
    name = "language_model.model.layers.1.feed_forward.w2.weight"
    with SafetensorsWriter(
        checkpoint / "model.safetensors", {key: ("F32", shape) for key, shape in layout.items()}
    ) as writer:
        writer.write(name, np.full(layout[name], 1e5, np.float32))
    with pytest.raises(InvalidCheckpoint, match=r"w2\.weight holds values beyond fp16's 65504"):
        export_llm(checkpoint, tmp_path / "out", tp_size=1, precision="fp16", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


@pytest.mark.parametrize(
    ("model", "tp_size", "works"),
    [
        ("InternVL2_5-1B", 4, "use TP = 1, 2$"),
        ("InternVL2_5-1B", 8, "use TP = 1, 2$"),
        ("InternVL2_5-8B", 3, "use TP = 1, 2, 4, 8$"),
        ("InternVL2_5-8B", 0, "use TP = 1, 2, 4, 8$"),
    ],
)
def test_impossible_tp(model: str, tp_size: int, works: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config(model)))
    with pytest.raises(InvalidTensorParallel, match=works):
        export_llm(tmp_path, tmp_path / "out", tp_size=tp_size, progress=False)
    assert not (tmp_path / "out").exists()


def test_missing_tensor(tmp_path: Path) -> None:
    config = tiny_config("qwen2", "300m", llm_layers=1)
    checkpoint = write_random_checkpoint(tmp_path / "c", config, zeros=True, tokenizer=False)
    config["llm_config"]["num_hidden_layers"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        IncompleteCheckpoint, match=r"lacks 12 of 27 tensors: .*layers\.1\.self_attn"
    ):
        export_llm(checkpoint, tmp_path / "out", tp_size=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_missing_shard(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(
        tmp_path / "c", tiny_config("qwen2", "300m"), zeros=True, tokenizer=False, shards=3
    )
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"lacks 1 of 3 shards .*model-00002-of-00003"):
        export_llm(checkpoint, tmp_path / "out", tp_size=1, progress=False)


def test_a_killed_conversion_leaves_nothing_and_the_next_one_cleans_up(
    internlm2: Path, tmp_path: Path
) -> None:
    """The process ends without cleaning up, as by SIGKILL, while it writes."""
    output = tmp_path / "llm" / "bf16-tp2" / "checkpoint"
    killed = f"""
        import os
        from pathlib import Path
        from export import export_llm
        from internvl_triton.safetensors_file import SafetensorsWriter
        write, calls = SafetensorsWriter.write, []
        def write_ten(*args, **kwargs):
            calls.append(args)
            if len(calls) > 10:
                os._exit(9)
            write(*args, **kwargs)
        SafetensorsWriter.write = write_ten
        export_llm(Path({str(internlm2)!r}), Path({str(output)!r}), tp_size=2, progress=False)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(killed)], cwd=ROOT)
    assert process.returncode == 9
    assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint.tmp"]
    export_llm(internlm2, output, tp_size=2, progress=False)
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint"]


def test_a_failed_conversion_keeps_the_older_one(
    internlm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = export_llm(internlm2, tmp_path / "out", tp_size=1, progress=False)
    before = (output / "rank0.safetensors").read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("internvl_triton.safetensors_file.SafetensorsWriter.write", fail)
    with pytest.raises(OSError, match="No space left"):
        export_llm(internlm2, output, tp_size=2, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "rank0.safetensors").read_bytes() == before


def test_an_older_conversion_is_replaced(internlm2: Path, tmp_path: Path) -> None:
    output = export_llm(internlm2, tmp_path / "out", tp_size=4, progress=False)
    export_llm(internlm2, output, tp_size=1, progress=False)
    assert sorted(os.listdir(output)) == ["config.json", "rank0.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_foreign_files_are_never_replaced(internlm2: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildFailed, match=r"holds 'thesis\.txt', which this step did not write"):
        export_llm(internlm2, tmp_path, tp_size=1, progress=False)
    with pytest.raises(BuildFailed, match="is a file; give a directory"):
        export_llm(internlm2, tmp_path / "thesis.txt", tp_size=1, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_refused_before_writing(
    internlm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    with pytest.raises(BuildFailed, match=r"needs 0\.0 GB, its disk has 0\.0 GB free"):
        export_llm(internlm2, tmp_path / "deep" / "out", tp_size=1, progress=False)
    assert not (tmp_path / "deep").exists()


def test_command_line(internlm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(internlm2), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--tp-size", "3"]) == 1
    assert "error: tp_size 3 cannot split this model" in capsys.readouterr().err
    assert main([*arguments, "--tp-size", "2", "--precision", "fp16"]) == 0
    assert (tmp_path / "out" / "rank1.safetensors").is_file()


def test_progress_counts_every_weight(
    internlm2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_llm(internlm2, tmp_path / "out", tp_size=1)
    assert "language model, TP 1: 100%" in capfd.readouterr().err
