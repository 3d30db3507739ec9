"""Checkpoints that are broken or not what they say: `make engines` ends with one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from build.engines import main
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.errors import InvalidCheckpoint, UnsupportedCheckpoint
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import published_config
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

UP = "language_model.model.layers.0.mlp.up_proj.weight"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen2", "300m", llm_layers=2, vision_layers=2, head_dim=16)
    return write_random_checkpoint(tmp_path_factory.mktemp("sound") / "c", config)


@pytest.fixture
def refusal(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[Path], Any]], str]:
    """Damage a copy of the checkpoint; the one line that `make engines` says about it."""

    def convert(damage: Callable[[Path], Any]) -> str:
        checkpoint = shutil.copytree(sound, tmp_path / "checkpoint")
        damage(checkpoint)
        capsys.readouterr()
        options = [f"--model={checkpoint}", "--profile=cpu", f"--artifacts={tmp_path / 'a'}"]
        assert main(options) == 1
        assert not [path for path in (tmp_path / "a").rglob("*") if path.suffix == ".tmp"]
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert "Traceback" not in "".join(lines)
        return lines[-1]

    return convert


# --- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, -64, 64.5, "64", True, [64]])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("llm_config", "hidden_size"),
        ("llm_config", "num_attention_heads"),
        ("llm_config", "num_hidden_layers"),
        ("llm_config", "intermediate_size"),
        ("llm_config", "vocab_size"),
        ("llm_config", "max_position_embeddings"),
        ("vision_config", "hidden_size"),
        ("vision_config", "num_attention_heads"),
        ("vision_config", "num_hidden_layers"),
        ("vision_config", "image_size"),
        ("vision_config", "patch_size"),
        (None, "max_dynamic_patch"),
    ],
)
def test_sizes_are_positive_integers(section: str | None, key: str, value: object) -> None:
    config = published_config("InternVL2_5-1B")
    (config[section] if section else config)[key] = value
    where = section or r"config\.json"
    with pytest.raises(InvalidCheckpoint, match=rf"^{where}: {key} is .*; it must be an integer"):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("value", [None, 0, -1, "1e6", float("nan"), float("inf"), False])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("llm_config", "rope_theta"),
        ("llm_config", "rms_norm_eps"),
        ("vision_config", "layer_norm_eps"),
        (None, "downsample_ratio"),
    ],
)
def test_factors_are_positive_numbers(section: str | None, key: str, value: object) -> None:
    config = published_config("InternVL2_5-2B")
    (config[section] if section else config)[key] = value
    with pytest.raises(InvalidCheckpoint, match=rf"{key} is .*; it must be a number above 0"):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("vision_config", "qkv_bias"),
        ("vision_config", "qk_normalization"),
        ("llm_config", "use_sliding_window"),
        (None, "use_thumbnail"),
        (None, "dynamic_image_size"),
        (None, "pad2square"),
    ],
)
def test_switches_are_true_or_false(section: str | None, key: str) -> None:
    config = published_config("InternVL2_5-1B")
    (config[section] if section else config)[key] = "no"
    with pytest.raises(InvalidCheckpoint, match=f"{key} is 'no'; it must be true or false"):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("llm_config", {"num_key_value_heads": 4}, "14 is not divisible by 4"),
        ("llm_config", {"num_attention_heads": 18}, "896 is not divisible by 18"),
        ("llm_config", {"rope_scaling": "dynamic"}, "rope_scaling is 'dynamic'; it must be an"),
        ("vision_config", {"num_attention_heads": 5}, "1024 is not divisible by 5"),
        (None, {"system_message": 3}, "system_message is 3; it must be a text"),
        (None, {"llm_config": []}, "has no 'llm_config'"),
        (None, {"force_image_size": "448"}, "force_image_size is '448'; it must be an integer"),
    ],
)
def test_values_that_do_not_fit(section: str | None, change: dict[str, Any], message: str) -> None:
    config = published_config("InternVL2_5-1B")
    (config[section] if section else config).update(change)
    with pytest.raises(InvalidCheckpoint, match=message):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("where", ["top", "llm_config"])
def test_quantised_checkpoints_are_refused(where: str) -> None:
    config = published_config("InternVL2_5-8B")
    section = config if where == "top" else config[where]
    section["quantization_config"] = {"quant_method": "awq", "bits": 4}
    with pytest.raises(UnsupportedCheckpoint, match=r"quantised already \(awq\).*PRECISION=int8"):
        ModelSpec.from_config(config)


def test_rope_parameters_as_transformers_5_saves_them() -> None:
    config = published_config("InternVL2_5-26B")
    llm = config["llm_config"]
    del llm["rope_theta"], llm["rope_scaling"]
    llm["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 5e7}
    assert ModelSpec.from_config(config).llm.rope_theta == 5e7
    llm["rope_parameters"]["rope_type"] = "yarn"
    with pytest.raises(UnsupportedCheckpoint, match="rope_parameters type 'yarn'"):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_no_config(refusal: Callable[..., str], content: bytes, message: str) -> None:
    assert message in refusal(lambda c: (c / "config.json").write_bytes(content))


def change_config(section: str, **values: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        config = json.loads(path.read_text())
        config[section].update(values)
        path.write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "unknown"),
    [
        (change_config("llm_config", num_hidden_layers=1), "language_model.model.layers.1."),
        (change_config("vision_config", qkv_bias=False), "layers.0.attn.qkv.bias"),
        (change_config("vision_config", norm_type="rms_norm"), "layers.0.norm1.bias"),
    ],
)
def test_a_config_that_leaves_weights_out(
    refusal: Callable[..., str], change: Callable[[Path], None], unknown: str
) -> None:
    error = refusal(change)
    assert "config.json knows nothing, so it describes another model: " in error
    assert unknown in error


# --- weights ------------------------------------------------------------------------------------


def weights(checkpoint: Path) -> Path:
    return checkpoint / "model.safetensors"


def change_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        tensors = dict(load_file(weights(checkpoint)))
        change(tensors)
        save_file(tensors, weights(checkpoint))

    return damage


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_a_truncated_file(refusal: Callable[..., str], size: int) -> None:
    error = refusal(lambda c: weights(c).write_bytes(weights(c).read_bytes()[:size]))
    assert "model.safetensors is not a complete safetensors file" in error


def test_a_pointer_of_git_lfs_is_no_file(refusal: Callable[..., str]) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1876395376\n"
    assert "download it again" in refusal(lambda c: weights(c).write_text(pointer))


def test_pickled_weights(refusal: Callable[..., str]) -> None:
    error = refusal(lambda c: weights(c).rename(c / "pytorch_model.bin"))
    assert "only safetensors checkpoints can be converted" in error


@pytest.mark.parametrize("name", [UP, FC1, HEAD, "mlp1.0.bias"])
def test_a_missing_tensor(refusal: Callable[..., str], name: str) -> None:
    error = refusal(change_weights(lambda tensors: tensors.pop(name)))
    assert "lacks 1 of" in error
    assert error.endswith(name)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.int32, "I32"),
        (np.float64, "F64"),
        (np.bool_, "BOOL"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
    ],
)
@pytest.mark.parametrize("name", [UP, FC1])
def test_a_dtype_that_is_no_models(
    refusal: Callable[..., str], name: str, dtype: Any, stored: str
) -> None:
    error = refusal(change_weights(lambda t: t.update({name: t[name].astype(dtype)})))
    assert f"{name} is stored as {stored}; supported: BF16, F16, F32" in error


def test_a_transposed_matrix(refusal: Callable[..., str]) -> None:
    error = refusal(change_weights(lambda t: t.update({UP: np.ascontiguousarray(t[UP].T)})))
    assert f"{UP} has shape (64, 128); config.json implies (128, 64)" in error


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, FC1, HEAD, "mlp1.0.bias"])
def test_a_weight_that_is_no_number(
    refusal: Callable[..., str], name: str, value: float, dtype: Any
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].astype(dtype)
        tensors[name].reshape(-1)[-1] = value

    error = refusal(change_weights(spoil))
    assert f"model.safetensors: {name} holds weights that are infinite or not a number" in error


def test_the_largest_number_of_a_dtype_is_one(sound: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(sound, tmp_path / "checkpoint")
    largest = ml_dtypes.finfo(ml_dtypes.bfloat16).max

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[UP] = tensors[UP].astype(ml_dtypes.bfloat16)
        tensors[UP][0] = [largest, -largest] * (tensors[UP].shape[1] // 2)

    change_weights(spoil)(checkpoint)
    assert Checkpoint(checkpoint).read(UP)[0, 1] == -largest


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "c"}}']
)
def test_an_unreadable_index(refusal: Callable[..., str], index: str) -> None:
    error = refusal(lambda c: (c / "model.safetensors.index.json").write_text(index))
    assert "model.safetensors.index.json has no readable weight_map" in error


# --- tokenizer ----------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda checkpoint: (checkpoint / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("vocab.json", "[]"), "vocab.json holds no JSON object"),
        (write("vocab.json", "{"), "vocab.json is not valid JSON"),
        (write("vocab.json", '{"a": "b"}'), "are not a byte-level BPE"),
        (write("merges.txt", "#version: 0.2\nabc"), "are not a byte-level BPE"),
        (write("merges.txt", "no such"), "are not a byte-level BPE"),
        (write("merges.txt", b"\xff\xfe"), "are not a byte-level BPE"),
        (write("added_tokens.json", "[]"), "added_tokens.json holds no JSON object"),
        (write("added_tokens.json", '{"<x>": "1"}'), "'<x>' has id '1': not an id"),
        (write("added_tokens.json", '{"<x>": -1}'), "'<x>' has id -1: not an id"),
        (write("added_tokens.json", '{"<x>": 5000}'), "the tokenizer has 5001 ids"),
        (write("tokenizer_config.json", "[]"), "tokenizer_config.json holds no JSON object"),
        (
            write("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}'),
            "no readable added_tokens_decoder",
        ),
        (write("tokenizer.model", "no model"), "tokenizer.model is not a SentencePiece model"),
        (lambda c: (c / "merges.txt").unlink(), "has no tokenizer"),
        (
            lambda c: ((c / "merges.txt").unlink(), (c / "tokenizer.json").write_text("{}")),
            "tokenizer.json is not a tokenizer",
        ),
    ],
)
def test_a_broken_tokenizer(
    refusal: Callable[..., str], damage: Callable[[Path], Any], message: str
) -> None:
    assert message in refusal(damage)
