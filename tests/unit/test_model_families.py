"""InternVL2 and InternVL3 beside InternVL2.5: which convert, their prompts, which are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from build.model_source import artifact_name, is_known_name
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import UnknownModel, UnsupportedCheckpoint
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.published_models import OTHER_GENERATIONS, published_config
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.tokenizer import load_tokenizer
from tests.reference import reference_ids

# Parameters in billions, as the model cards round them.
BILLIONS = {
    "InternVL2-1B": 0.94,
    "InternVL2-2B": 2.21,
    "InternVL2-8B": 8.08,
    "InternVL2-26B": 25.5,
    "InternVL3-1B": 0.94,
    "InternVL3-2B": 2.09,
    "InternVL3-8B": 7.94,
    "InternVL3-14B": 15.1,
    "InternVL3-38B": 38.4,
    "InternVL3-78B": 78.4,
}
# internvl/conversation.py, OpenGVLab/InternVL @ 2410d1d, sep '<|im_end|>' without a line break
INTERNVL2_PROMPT = (
    "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"  # noqa: RUF001
    "英文名叫InternVL, 是一个有用无害的人工智能助手。<|im_end|>"
    "<|im_start|>user\nHow are you?<|im_end|><|im_start|>assistant\nFine.<|im_end|>"
    "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
)


@pytest.mark.parametrize("name", OTHER_GENERATIONS)
def test_the_sizes_add_up_to_the_published_parameters(name: str) -> None:
    spec = ModelSpec.from_config(published_config(name))
    total = sum(math.prod(shape) for shape in checkpoint_shapes(spec).values())
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)
    assert is_known_name(name)
    assert artifact_name(f"OpenGVLab/{name}") == name
    assert spec.template == ("internvl2_5" if name.startswith("InternVL3") else spec.template)


@pytest.mark.parametrize(
    ("family", "template"), [("qwen2", "Hermes-2"), ("internlm2", "internlm2-chat")]
)
def test_the_prompt_of_internvl2(family: str, template: str, tmp_path: Path) -> None:
    config = tiny_config(family, "300m") | {"template": template}  # type: ignore[arg-type]
    checkpoint = write_random_checkpoint(tmp_path / "c", config)
    spec, tokenizer = ModelSpec.from_checkpoint(checkpoint), load_tokenizer(checkpoint)
    messages = (
        '[{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."},'
        ' {"role": "user", "content": "Why?"}]'
    )
    found = Preprocessor(spec, Limits.for_model(spec), tokenizer)(Request(messages=messages))
    expected = reference_ids(checkpoint, INTERNVL2_PROMPT)
    assert found["input_ids"][0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("InternVL2-4B", "cannot be converted: its language model is Phi-3; use InternVL2_5-4B"),
        ("InternVL2-40B", "Yi-34B, a Llama; use InternVL2_5-38B"),
        ("OpenGVLab/InternVL3-9B", "InternLM3; use InternVL3-8B"),
        ("InternVL3-8B-hf", "transformers' own format.*: MODEL=InternVL3-8B$"),
        ("InternVL3_5-8B", "Qwen3 and GPT-OSS"),
        ("InternVL2_5-8B-AWQ", "quantised already.*MODEL=InternVL2_5-8B PRECISION=int4_awq$"),
        ("InternVL3-80B", "neither a directory nor a known name .did you mean InternVL3-8B"),
    ],
)
def test_names_that_are_refused_say_why(name: str, message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        artifact_name(name)


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ("Phi3ForCausalLM", "InternVL2-4B"),
        ("LlamaForCausalLM", "InternVL2-40B"),
        ("InternLM3ForCausalLM", "InternVL3-9B"),
        ("Qwen3ForCausalLM", r"InternVL3\.5"),
        ("MistralForCausalLM", "'MistralForCausalLM' is not supported; supported: Qwen2"),
    ],
)
def test_language_models_that_are_refused_say_why(llm: str, message: str) -> None:
    config = published_config("InternVL3-8B")
    config["llm_config"]["architectures"] = [llm]
    with pytest.raises(UnsupportedCheckpoint, match=message):
        ModelSpec.from_config(config)
