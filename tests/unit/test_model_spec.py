"""Facts come from config.json; keys that are absent mean the class defaults."""

from __future__ import annotations

import json

import pytest

from internvl_triton.errors import (
    IncompleteCheckpoint,
    InvalidCheckpoint,
    InvalidTensorParallel,
    UnsupportedCheckpoint,
)
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import published_config


def test_numbers_of_the_8b() -> None:
    spec = ModelSpec.from_config(published_config("InternVL2_5-8B"))
    assert spec.tokens_per_tile == 256  # (448 / 14 * 0.5)^2
    assert spec.max_tiles_with_thumbnail == 13  # 12 + thumbnail
    assert spec.vision.num_positions == 1025  # 32^2 + class token
    assert spec.vision.head_dim == 64
    assert spec.llm.head_dim == 128
    assert spec.llm.padded_vocab_size(1) == 92553
    assert spec.llm.padded_vocab_size(2) == 92554
    assert spec.llm.padded_vocab_size(8) == 92560


def test_absent_vision_keys_take_the_class_defaults() -> None:
    config = published_config("InternVL2_5-26B")
    for key in ("norm_type", "qk_normalization", "qkv_bias", "layer_norm_eps"):
        del config["vision_config"][key]
    vision = ModelSpec.from_config(config).vision
    assert vision.norm_type == "rms_norm"
    assert vision.qk_normalization
    assert not vision.qkv_bias
    assert vision.layer_norm_eps == 1e-6


def test_absent_top_level_keys_take_the_class_defaults() -> None:
    config = published_config("InternVL2_5-2B")
    for key in ("ps_version", "max_dynamic_patch", "use_thumbnail"):
        del config[key]
    spec = ModelSpec.from_config(config)
    assert (spec.ps_version, spec.max_tiles, spec.use_thumbnail) == ("v1", 6, False)
    del config["dynamic_image_size"]
    assert ModelSpec.from_config(config).max_tiles == 1


def test_internlm2_bias_defaults_to_true_and_is_refused() -> None:
    config = published_config("InternVL2_5-2B")
    del config["llm_config"]["bias"]
    with pytest.raises(UnsupportedCheckpoint, match=r"llm_config\.bias"):
        ModelSpec.from_config(config)


def test_a_sliding_window_that_is_not_used_is_not_used() -> None:
    config = published_config("InternVL2_5-1B")
    config["llm_config"]["sliding_window"] = 32768
    ModelSpec.from_config(config)
    config["llm_config"]["use_sliding_window"] = True
    with pytest.raises(UnsupportedCheckpoint, match="use_sliding_window"):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "internvl"}, "repository without '-hf'.* 'internvl_chat'"),
        ({"model_type": "internvl_vl"}, "internvl_chat"),
        ({"template": "phi3-chat"}, "phi3-chat"),
        ({"pad2square": True}, "pad2square"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"force_image_size": 224}, "force_image_size"),
    ],
)
def test_other_architectures_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        ModelSpec.from_config(published_config("InternVL2_5-1B") | change)


def test_other_language_models_and_rope_scalings_are_refused() -> None:
    config = published_config("InternVL2_5-1B")
    config["llm_config"] |= {"architectures": ["Phi3ForCausalLM"]}
    with pytest.raises(UnsupportedCheckpoint, match="Phi3ForCausalLM"):
        ModelSpec.from_config(config)
    config = published_config("InternVL2_5-1B")
    config["llm_config"] |= {"rope_scaling": {"type": "yarn", "factor": 4}}
    with pytest.raises(UnsupportedCheckpoint, match="yarn"):
        ModelSpec.from_config(config)


def test_impossible_tensor_parallelism_names_what_works() -> None:
    spec = ModelSpec.from_config(published_config("InternVL2_5-1B"))
    with pytest.raises(InvalidTensorParallel, match=r"14 attention heads.*use TP = 1, 2$"):
        spec.llm.check_tp_size(4)
    with pytest.raises(InvalidTensorParallel):
        spec.llm.check_tp_size(3)
    spec.llm.check_tp_size(2)


def test_a_directory_without_or_with_a_broken_config(tmp_path) -> None:
    with pytest.raises(IncompleteCheckpoint, match=r"no config\.json"):
        ModelSpec.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="not valid JSON"):
        ModelSpec.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    with pytest.raises(UnsupportedCheckpoint, match="template"):
        ModelSpec.from_checkpoint(tmp_path)
