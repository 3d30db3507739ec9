"""The independent reference: transformers' native InternVL port, in fp32, eager attention.

It shares no code with the project. Weights are mapped from the original names (facts: the port
equals OpenGVLab's `modeling_internvl_chat.py` bit for bit in fp32), prompts come from the
reference template as one string, tiles from the reference formula (`tests.reference`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

from transformers import (  # noqa: E402
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_VISION_NAMES = [
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (
        r"^vision_model\.embeddings\.position_embedding$",
        "model.vision_tower.embeddings.position_embeddings",
    ),
    (
        r"^vision_model\.embeddings\.patch_embedding\.",
        "model.vision_tower.embeddings.patch_embeddings.projection.",
    ),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk])_norm\.", r".attention.\1_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls1$", ".lambda_1"),
    (r"\.ls2$", ".lambda_2"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
]
_INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
}


class Oracle:
    """`checkpoint`, an original-format directory, as transformers runs it."""

    def __init__(self, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        self.image_token_id = _added_tokens(checkpoint).get("<IMG_CONTEXT>", 1)
        vision, llm = config["vision_config"], config["llm_config"]
        self.internlm2 = llm["architectures"][0] == "InternLM2ForCausalLM"
        port_config = InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=vision["hidden_size"],
                num_hidden_layers=vision["num_hidden_layers"],
                num_attention_heads=vision["num_attention_heads"],
                intermediate_size=vision["intermediate_size"],
                attention_bias=vision["qkv_bias"],
                use_qk_norm=vision["qk_normalization"],
                norm_type=vision["norm_type"],
                layer_norm_eps=vision["layer_norm_eps"],
                image_size=[vision["image_size"]] * 2,
                patch_size=[vision["patch_size"]] * 2,
                use_mean_pooling=True,
                use_absolute_position_embeddings=True,
                hidden_act="gelu",
            ),
            text_config=(LlamaConfig if self.internlm2 else Qwen2Config)(
                hidden_size=llm["hidden_size"],
                num_hidden_layers=llm["num_hidden_layers"],
                num_attention_heads=llm["num_attention_heads"],
                num_key_value_heads=llm["num_key_value_heads"],
                head_dim=llm["hidden_size"] // llm["num_attention_heads"],
                intermediate_size=llm["intermediate_size"],
                vocab_size=llm["vocab_size"],
                rms_norm_eps=llm["rms_norm_eps"],
                max_position_embeddings=llm["max_position_embeddings"],
                rope_parameters={"rope_type": "default", "rope_theta": llm["rope_theta"]},
                tie_word_embeddings=False,
            ),
            image_token_id=self.image_token_id,
            downsample_ratio=config["downsample_ratio"],
            tie_word_embeddings=False,
        )
        port_config._attn_implementation = "eager"
        torch.manual_seed(0)
        self.model = InternVLForConditionalGeneration(port_config).float().eval()
        self.model.set_attn_implementation("eager")
        self._load(checkpoint, llm)

    def _load(self, checkpoint: Path, llm: dict) -> None:
        state: dict[str, torch.Tensor] = {}
        for shard in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    state.update(self._port(name, opened.get_tensor(name).float(), llm))
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert not missing, missing

    def _port(self, name: str, tensor: torch.Tensor, llm: dict) -> dict[str, torch.Tensor]:
        if name.startswith("language_model."):
            return self._port_llm(name.removeprefix("language_model."), tensor, llm)
        target = name
        for pattern, replacement in _VISION_NAMES:
            target = re.sub(pattern, replacement, target)
        if ".attn.qkv." in target:
            parts = tensor.chunk(3, dim=0)
            return {
                target.replace(".attn.qkv.", f".attention.{letter}_proj."): part
                for letter, part in zip("qkv", parts, strict=True)
            }
        return {target: tensor}

    def _port_llm(self, name: str, tensor: torch.Tensor, llm: dict) -> dict[str, torch.Tensor]:
        if name in ("lm_head.weight", "output.weight"):
            return {"lm_head.weight": tensor}
        name = "model.language_model." + name.removeprefix("model.")
        for ours, theirs in _INTERNLM2_NAMES.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        if ".attention.wqkv." in name:
            kv = llm["num_key_value_heads"]
            groups = llm["num_attention_heads"] // kv
            head_dim = llm["hidden_size"] // llm["num_attention_heads"]
            grouped = tensor.view(kv, groups + 2, head_dim, -1)
            q, k, v = grouped[:, :groups], grouped[:, -2], grouped[:, -1]
            return {
                name.replace("attention.wqkv", f"self_attn.{letter}_proj"): part.reshape(
                    -1, tensor.shape[1]
                )
                for letter, part in zip("qkv", (q, k, v), strict=True)
            }
        return {name: tensor}

    @torch.no_grad()
    def visual_features(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 (num_tiles, 448, 448, 3) -> float32 (num_tiles * 256, hidden)."""
        output = self.model.model.get_image_features(pixel_values(tiles))
        features = getattr(output, "pooler_output", output)
        return torch.as_tensor(features).reshape(-1, features.shape[-1]).numpy()

    @torch.no_grad()
    def logits(self, input_ids: list[int], tiles: np.ndarray | None = None) -> np.ndarray:
        """float32 (len(input_ids), vocab). `input_ids` hold <IMG_CONTEXT> at visual positions."""
        output = self.model(
            input_ids=torch.tensor([input_ids]),
            pixel_values=None if tiles is None or not len(tiles) else pixel_values(tiles),
        )
        return output.logits[0].numpy()

    @torch.no_grad()
    def greedy(
        self, input_ids: list[int], tiles: np.ndarray | None, max_new_tokens: int, end_id: int = -1
    ) -> list[int]:
        """Greedy ids without end_id, by a plain loop over the model's cache."""
        return self.greedy_with_margin(input_ids, tiles, max_new_tokens, end_id)[0]

    @torch.no_grad()
    def greedy_with_margin(
        self, input_ids: list[int], tiles: np.ndarray | None, max_new_tokens: int, end_id: int = -1
    ) -> tuple[list[int], float]:
        """Greedy ids and the smallest gap between the best and second best logit on the way."""
        pixels = None if tiles is None or not len(tiles) else pixel_values(tiles)
        output = self.model(
            input_ids=torch.tensor([input_ids]), pixel_values=pixels, use_cache=True
        )
        answer: list[int] = []
        margin = float("inf")
        while True:
            best = output.logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            token = int(best.indices[0])
            if token == end_id:
                return answer, margin
            answer.append(token)
            if len(answer) == max_new_tokens:
                return answer, margin
            output = self.model(
                input_ids=torch.tensor([[token]]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )


def pixel_values(tiles: np.ndarray) -> torch.Tensor:
    """The reference's tensor: float (num_tiles, 3, 448, 448), ToTensor then Normalize."""
    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std


def _added_tokens(checkpoint: Path) -> dict[str, int]:
    path = checkpoint / "added_tokens.json"
    return json.loads(path.read_text()) if path.is_file() else {}
