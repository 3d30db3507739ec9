"""The standalone language model, loaded by transformers, against the whole model's text logits."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from export import export_hf_llm
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from tests.oracle import Oracle, torch

IDS = np.random.default_rng(0).integers(3, 1200, 41).tolist()


@torch.no_grad()
def logits(model: "torch.nn.Module", ids: list[int]) -> np.ndarray:
    return model.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_loads_qwen2(shards: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

    config = tiny_config("qwen2", "300m")
    checkpoint = write_random_checkpoint(tmp_path / "c", config, shards=shards)
    directory = export_hf_llm(checkpoint, tmp_path / "llm", progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    assert isinstance(model, Qwen2ForCausalLM)
    assert not model.config.tie_word_embeddings
    np.testing.assert_allclose(logits(model, IDS), Oracle(checkpoint).logits(IDS), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer) == model.config.vocab_size


def test_internlm2_is_a_llama_with_its_qkv_taken_apart(tmp_path: Path) -> None:
    """transformers has no InternLM2: the tensors go into LlamaForCausalLM by the family's rule."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config("internlm2", "300m"))
    directory = export_hf_llm(checkpoint, tmp_path / "llm", progress=False)
    names = {
        "model.tok_embeddings": "model.embed_tokens",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, array in load_file(directory / "model.safetensors").items():
        tensor = torch.from_numpy(array.astype(np.float32))
        if "wqkv" in name:
            groups = tensor.view(2, 4, 64, 256)  # 2 kv heads, each with 2 q, k and v; head_dim 64
            for letter, part in zip("qkv", groups.split([2, 1, 1], dim=1), strict=True):
                target = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                state[target] = part.reshape(-1, 256)
            continue
        for ours, theirs in names.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        state["lm_head.weight" if name == "output.weight" else name] = tensor
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=512,
            vocab_size=1283,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="eager",
        )
    )
    model.load_state_dict(state)
    np.testing.assert_allclose(logits(model, IDS), Oracle(checkpoint).logits(IDS), atol=1e-5)
