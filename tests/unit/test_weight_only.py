"""Weight-only int8 and int4: the arithmetic against NVIDIA's loops, artefacts, and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export import PRECISIONS, check_precision, export_llm, stored_precision
from export.llm_checkpoint import main
from internvl_triton.cpu_llm.rank_layout import rank_shapes
from internvl_triton.cpu_llm.rank_weights import load_ranks
from internvl_triton.cpu_llm.weight_only import QuantizedWeight, is_quantized, linear, quantize
from internvl_triton.errors import ArtifactMismatch, BuildFailed, InvalidTensorParallel
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
ALGO = {"int8": "W8A16", "int4": "W4A16"}


def brute_force(weight: np.ndarray, bits: int) -> tuple[list[list[int]], list[float]]:
    """`symmetric_quantize` of TensorRT-LLM 0.21, element by element."""
    limit = 2 ** (bits - 1)
    integers, scales = [], []
    for row in weight.astype(np.float32):
        scale = np.float32(max(abs(value) for value in row)) / np.float32(limit)
        quotients = [float(value / scale) if scale else 0.0 for value in row]
        rounded = [int(math.copysign(math.floor(abs(q) + 0.5), q)) for q in quotients]
        integers.append([max(-limit, min(limit - 1, value)) for value in rounded])
        scales.append(float(np.array(scale).astype(weight.dtype).astype(np.float32)))
    return integers, scales


@pytest.mark.parametrize("dtype", [BF16, np.dtype("f2"), np.dtype("f4")], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_against_brute_force(bits: int, dtype: np.dtype) -> None:
    random = np.random.default_rng(bits)
    weight = random.standard_normal((33, 64)) * np.exp(random.standard_normal((33, 1)))
    weight[5] = 0
    quantized = quantize(weight.astype(dtype), bits)
    integers, scales = brute_force(weight.astype(dtype), bits)
    np.testing.assert_array_equal(quantized.integers(), integers)
    np.testing.assert_array_equal(quantized.scales, np.array(scales, np.float32))
    np.testing.assert_array_equal(
        quantized.dequantized(),
        np.array(integers, np.float32) * np.array(scales, np.float32)[:, None],
    )


def test_a_row_by_hand() -> None:
    # max |row| = 8, so the scale of 4 bits is 8 / 2^3 = 1: halves go away from zero, 8 becomes 7
    row = np.array([[8, -8, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49]], np.float32)
    assert quantize(row, 4).integers().tolist() == [[7, -8, 1, -1, 2, 3, -3, 0]]
    # with 8 bits the scale is 8 / 128 = 1/16
    assert quantize(row, 8).integers().tolist() == [[127, -128, 8, -8, 24, 40, -40, 8]]
    assert quantize(row, 8).scales.tolist() == [0.0625]


def test_the_even_input_is_in_the_low_half_of_a_byte() -> None:
    packed = quantize(np.array([[1.0, -2.0, -8.0, 7.0]], np.float32), 4)
    # 1 = 0x1, -2 = 0xE, -8 = 0x8, 7 = 0x7
    assert packed.values.view(np.uint8).tolist() == [[0xE1, 0x78]]
    assert packed.integers().tolist() == [[1, -2, -8, 7]]


@pytest.mark.parametrize("bits", [8, 4])
def test_error_is_at_most_half_a_step_except_for_the_largest_positive(bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 128)).astype(np.float32)
    quantized = quantize(weight, bits)
    steps = np.abs(quantized.dequantized() - weight) / quantized.scales[:, None]
    assert steps.max() <= 1 + 1e-5  # max -> 2^(bits-1) -> cut by one step
    cut = weight > (2 ** (bits - 1) - 0.5) * quantized.scales[:, None]
    assert steps[~cut].max() <= 0.5 + 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_and_memory(bits: int) -> None:
    random = np.random.default_rng(2)
    weight = quantize(random.standard_normal((48, 64)).astype(np.float32), bits)
    x = random.standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_allclose(linear(x, weight), x @ weight.dequantized().T, rtol=1e-4, atol=1e-4)
    assert weight.nbytes == 48 * 64 * bits // 8 + 48 * 4


def test_which_tensors_are_quantised() -> None:
    """`weight_only_quantize_dict`: layers' matrices; not embedding, lm_head, norms, biases."""
    spec = ModelSpec.from_config(tiny_config("qwen2", "300m", llm_layers=1)).llm
    names = {name for name in rank_shapes(spec, 1) if is_quantized(name)}
    matrices = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    assert names == {f"transformer.layers.0.{matrix}.weight" for matrix in matrices}


# --- the artefact -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint(directory, tiny_config("qwen2", "300m"), tokenizer=False)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_config_and_files(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    plain = export_llm(checkpoint, tmp_path / "bf16", tp_size=2, progress=False)
    output = export_llm(
        checkpoint, tmp_path / precision, tp_size=2, precision=precision, progress=False
    )
    for rank in range(2):  # trtllm-build quantises for its own GPU
        name = f"rank{rank}.safetensors"
        assert (output / name).read_bytes() == (plain / name).read_bytes()
    config, plain_config = (
        json.loads((path / "config.json").read_text()) for path in (output, plain)
    )
    assert config["dtype"] == "bfloat16"
    assert config["quantization"].pop("quant_algo") == ALGO[precision]
    assert plain_config["quantization"].pop("quant_algo") is None
    assert config == plain_config
    # null, so that 0.21's own list leaves out lm_head and the embedding
    assert config["quantization"]["exclude_modules"] is None


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_the_engine_keeps_integers(
    precision: str, bits: int, checkpoint: Path, tmp_path: Path
) -> None:
    output = export_llm(checkpoint, tmp_path / "o", tp_size=2, precision=precision, progress=False)
    stored = load_file(output / "rank1.safetensors")
    _, ranks = load_ranks(output)
    layer = ranks[1].layers[1]
    prefix = "transformer.layers.1."
    for weight, name in (
        (layer.qkv, "attention.qkv"),
        (layer.dense, "attention.dense"),
        (layer.fc, "mlp.fc"),
        (layer.gate, "mlp.gate"),
        (layer.proj, "mlp.proj"),
    ):
        assert isinstance(weight, QuantizedWeight)
        assert weight.values.dtype == np.int8
        assert weight.bits == bits
        # one rank's inputs alone decide its scales, also where the inputs are divided
        integers, scales = brute_force(stored[f"{prefix}{name}.weight"], bits)
        np.testing.assert_array_equal(weight.integers(), integers)
        np.testing.assert_array_equal(weight.scales, np.array(scales, np.float32))
    head = stored["lm_head.weight"].astype(np.float32)
    np.testing.assert_array_equal(ranks[1].lm_head, head)
    assert ranks[1].vocab_embedding.dtype == BF16


@pytest.mark.parametrize(
    ("precision", "torch_dtype", "stored"),
    [
        ("int8", "bfloat16", "bf16"),
        ("int4", "float16", "fp16"),
        ("int8", "float32", "bf16"),  # W8A16: activations have 16 bits
        ("fp32", "bfloat16", "fp32"),
        (None, "float32", "fp32"),
    ],
)
def test_stored_precision(precision: str | None, torch_dtype: str, stored: str) -> None:
    assert stored_precision(precision, torch_dtype) == stored


def test_a_float32_checkpoint_becomes_bf16(tmp_path: Path) -> None:
    config = tiny_config("internlm2", "300m") | {"torch_dtype": "float32"}
    source = write_random_checkpoint(tmp_path / "c", config, dtype="F32", tokenizer=False)
    output = export_llm(source, tmp_path / "o", tp_size=1, precision="int4", progress=False)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(output / "rank0.safetensors").values()} == {BF16}


# --- refusals -----------------------------------------------------------------------------------

# TP sizes at which every side of a rank's matrices is a multiple of 64. The MLP of 4B is 11008 =
# 172 * 64 wide, at TP 8 that is 21.5 * 64; that of 78B 29568 = 462 * 64, at TP 4 115.5 * 64.
WEIGHT_ONLY_TP = {
    "InternVL2_5-1B": (1, 2),
    "InternVL2_5-2B": (1, 2, 4, 8),
    "InternVL2_5-4B": (1, 2, 4),
    "InternVL2_5-8B": (1, 2, 4, 8),
    "InternVL2_5-26B": (1, 2, 4, 8),
    "InternVL2_5-38B": (1, 2, 4, 8),
    "InternVL2_5-78B": (1, 2),
}


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("model", PUBLISHED_MODELS)
def test_published_sizes(model: str, precision: str) -> None:
    spec = ModelSpec.from_config(published_config(model))
    for tp_size in spec.llm.valid_tp_sizes:
        for plain in ("bf16", "fp16", "fp32"):
            check_precision(spec, plain, tp_size)
        if tp_size in WEIGHT_ONLY_TP[model]:
            check_precision(spec, precision, tp_size)
        else:
            with pytest.raises(InvalidTensorParallel):
                check_precision(spec, precision, tp_size)


def test_a_tp_size_that_leaves_no_multiple_of_64() -> None:
    spec = ModelSpec.from_config(published_config("InternVL2_5-78B"))
    with pytest.raises(
        InvalidTensorParallel,
        match=r"^int4 needs matrices whose sides are multiples of 64 .* on 8 rank\(s\) "
        r"mlp\.fc\.weight is 3696 x 8192; use TP = 1, 2, or precision bf16$",
    ):
        check_precision(spec, "int4", 8)


def test_a_model_that_fits_at_no_tp_size(tmp_path: Path) -> None:
    config = tiny_config("qwen2", "300m")
    config["llm_config"]["intermediate_size"] = 24
    checkpoint = write_random_checkpoint(tmp_path / "c", config, zeros=True, tokenizer=False)
    with pytest.raises(
        BuildFailed, match=r"is 24 x 256, and no other TP fits this model; use precision bf16$"
    ):
        export_llm(checkpoint, tmp_path / "o", tp_size=1, precision="int8", progress=False)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("precision", ["fp8", "int8_sq", "int4_awq"])
def test_calibrated_precisions_are_refused(
    precision: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "o")]
    assert main([*arguments, "--precision", precision]) == 1
    assert capsys.readouterr().err == (
        f"error: precision '{precision}' is calibrated on a GPU, which this converter does not do; "
        "it writes bf16, fp16, fp32, int8, int4, of which int8 and int4 need no calibration\n"
    )
    assert not (tmp_path / "o").exists()


def test_an_unknown_precision(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="precision is 'int3'; use one of bf16, fp16, fp32, int8"):
        export_llm(checkpoint, tmp_path / "o", tp_size=1, precision="int3", progress=False)
    assert PRECISIONS == ("bf16", "fp16", "fp32", "int8", "int4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_algo": "W4A16_AWQ"}, r"quant_algo 'W4A16_AWQ'; .* executes null, W8A16, W4A16"),
        ({"kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo='INT8'; .* executes None only"),
        ({"exclude_modules": ["*lm_head", "*qkv"]}, r"exclude_modules=\['\*lm_head'"),
    ],
    ids=str,
)
def test_quantisation_that_the_cpu_engine_does_not_execute(
    changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    output = export_llm(checkpoint, tmp_path / "o", tp_size=1, precision="int8", progress=False)
    config = json.loads((output / "config.json").read_text())
    config["quantization"] |= changes
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactMismatch, match=message):
        load_ranks(output)


def test_integers_in_the_order_of_some_gpu(checkpoint: Path, tmp_path: Path) -> None:
    """What NVIDIA's own converter writes; a square matrix has the shape of ours."""
    output = export_llm(checkpoint, tmp_path / "o", tp_size=1, precision="int8", progress=False)
    file = output / "rank0.safetensors"
    tensors = load_file(file)
    name = "transformer.layers.0.attention.dense.weight"
    save_file({**tensors, name: np.zeros(tensors[name].shape, np.int8)}, file)
    with pytest.raises(ArtifactMismatch, match=r"dense\.weight is int8, quantised for one kind of"):
        load_ranks(output)
