"""A checkpoint as transformers' own InternVL port runs it: fp32, eager attention, on the CPU.

One that was trained with LoRA is merged as peft does it, W + lora_alpha / r * B A in W's dtype.

It shares no arithmetic with what it judges: config.json is read here, weights are mapped from the
original names, and the port equals OpenGVLab's `modeling_internvl_chat.py` bit for bit in fp32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_triton.errors import InvalidCheckpoint, UnsupportedCheckpoint

if TYPE_CHECKING:
    import torch

__all__ = ["Forward", "Port", "Weights", "pixel_values"]

Array = NDArray[np.float32]
# (original name, tensor as stored) -> the float32 tensor to compute with
Weights = Callable[[str, "torch.Tensor"], "torch.Tensor"]

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
LORA_SCALE = 2  # lora_alpha / r of `wrap_llm_lora` and `wrap_backbone_lora`
_INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "embed_tokens",
}


@dataclass(frozen=True)
class Forward:
    """One pass over a prompt.

    features: float32 (num_visual_tokens, hidden), None without pictures.
    logits: float32 (number of positions asked for, vocab_size).
    """

    features: Array | None
    logits: Array


class Port:
    """`checkpoint`, a directory in OpenGVLab's original format.

    weights: what to compute with instead of the stored weights, such as dequantised ones.
    streamed: hold one matrix in memory at a time and read it from the checkpoint whenever it is
    used, for models that do not fit; otherwise everything is loaded, at 4 bytes a parameter.

    Raises UnsupportedCheckpoint for what the port cannot do, InvalidCheckpoint when the tensors
    are not those of the port.
    """

    def __init__(
        self, checkpoint: Path, *, weights: Weights | None = None, streamed: bool = False
    ) -> None:
        import torch
        from transformers import InternVLForConditionalGeneration

        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        for key, default, only in (("ps_version", "v1", "v2"), ("select_layer", -1, -1)):
            if config.get(key, default) != only:
                raise UnsupportedCheckpoint(
                    f"transformers' InternVL port has {key} {only!r} only; config.json has "
                    f"{config.get(key, default)!r}, so there is no reference"
                )
        self.image_token_id = _added_tokens(checkpoint).get("<IMG_CONTEXT>", 1)
        self._llm = config["llm_config"]
        self._weights = weights or (lambda _, tensor: tensor.float())
        port_config = _port_config(config, self.image_token_id)
        with torch.device("meta"):
            model: Any = InternVLForConditionalGeneration(port_config)
        self.model = model.eval()
        self.model.set_attn_implementation("eager")
        language_model = self.model.model.language_model
        # Its frequencies are computed when it is made, not loaded.
        language_model.rotary_emb = type(language_model.rotary_emb)(port_config.text_config)
        self._adapters: dict[str, Path] = {}
        self._sources = self._find_sources(checkpoint)
        if streamed:
            for name, module in self.model.named_modules():
                self._stream(name, module)
        else:
            state = {name: self._read(name) for name in self._sources}
            self.model.load_state_dict(state, assign=True)

    def visual_features(self, tiles: NDArray[np.uint8]) -> Array:
        """uint8 (num_tiles, 448, 448, 3) -> float32 (num_tiles * 256, hidden)."""
        import torch

        with torch.no_grad():
            output = self.model.model.get_image_features(pixel_values(tiles))
        features = getattr(output, "pooler_output", output)
        return _numpy(torch.as_tensor(features).reshape(-1, features.shape[-1]))

    def forward(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        tiles: NDArray[np.uint8],
        positions: Sequence[int],
    ) -> Forward:
        """One pass over prompt and answer; logits behind `positions` of the two together.

        The prompt holds <IMG_CONTEXT> where visual tokens go. In the answer it is a token like
        any other, as it is for a model that has generated it.
        """
        import torch

        features = self.visual_features(tiles) if len(tiles) else None
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            embedded = self.model.get_input_embeddings()(ids)
            if features is not None:
                visual = torch.tensor(prompt) == self.image_token_id
                embedded[0, : len(prompt)][visual] = torch.from_numpy(features)
            output = self.model(
                inputs_embeds=embedded, logits_to_keep=torch.tensor(list(positions))
            )
        return Forward(features, _numpy(output.logits[0]))

    def logits(self, input_ids: list[int], tiles: NDArray[np.uint8] | None = None) -> Array:
        """float32 (len(input_ids), vocab_size). `input_ids` hold <IMG_CONTEXT> at visual
        positions, which the port fills by itself."""
        import torch

        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor([input_ids]),
                pixel_values=None if tiles is None or not len(tiles) else pixel_values(tiles),
            )
        return _numpy(output.logits[0])

    def _find_sources(self, checkpoint: Path) -> dict[str, tuple[Path, str]]:
        """The port's name of each parameter -> shard and original name."""
        from safetensors import safe_open

        found: dict[str, tuple[Path, str]] = {}
        for shard in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if ".lora_" in name:
                        self._adapters[name] = shard
                    else:
                        found.update(dict.fromkeys(_port_names(_plain(name)), (shard, name)))
        wanted = self.model.state_dict().keys()
        if found.keys() != wanted:
            different = sorted(found.keys() ^ wanted)
            raise InvalidCheckpoint(
                f"{checkpoint} and transformers' InternVL port differ in {len(different)} "
                f"tensors, such as {different[0]}"
            )
        return found

    def _read(self, target: str) -> torch.Tensor:
        """One parameter of the port, float32."""
        from safetensors import safe_open

        shard, stored = self._sources[target]
        with safe_open(shard, framework="pt") as opened:
            tensor = opened.get_tensor(stored)
        module = stored.removesuffix(".weight").removesuffix(".base_layer")
        halves = [f"{module}.lora_{letter}.default.weight" for letter in "BA"]
        if stored.endswith(".weight") and halves[0] in self._adapters:
            b, a = (self._read_adapter(half) for half in halves)
            tensor = (tensor.float() + LORA_SCALE * b @ a).to(tensor.dtype)
        name = _plain(stored)
        targets = _port_names(name)
        whole = self._weights(name, tensor)
        if len(targets) == 1:
            return whole
        part = targets.index(target)
        if name.startswith("vision_model."):
            return whole.chunk(3, dim=0)[part]
        # InternLM2's rows are grouped by kv head: its query heads, one key and one value head.
        kv = self._llm["num_key_value_heads"]
        groups = self._llm["num_attention_heads"] // kv
        head_dim = self._llm["hidden_size"] // self._llm["num_attention_heads"]
        grouped = whole.view(kv, groups + 2, head_dim, -1)
        q, k, v = grouped[:, :groups], grouped[:, -2], grouped[:, -1]
        return (q, k, v)[part].reshape(-1, whole.shape[1])

    def _read_adapter(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._adapters[name], framework="pt") as opened:
            return opened.get_tensor(name).float()

    def _stream(self, name: str, module: torch.nn.Module) -> None:
        """Let a module read its own parameters when it is called and drop them afterwards."""
        import torch

        own = dict(module.named_parameters(recurse=False))
        if not own:
            return

        def load(*_: Any) -> None:
            for key in own:
                tensor = self._read(f"{name}.{key}")
                module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)

        def drop(*_: Any) -> None:
            module._parameters.update(own)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)


def pixel_values(tiles: NDArray[np.uint8]) -> torch.Tensor:
    """The reference's tensor: float (num_tiles, 3, 448, 448), ToTensor then Normalize."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std


def _port_config(config: dict[str, Any], image_token_id: int) -> Any:
    """The port's configuration; an absent key takes the default of the original's class."""
    from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config

    vision, llm = config["vision_config"], config["llm_config"]
    internlm2 = llm["model_type"] == "internlm2"
    rope = llm.get("rope_parameters") or llm  # transformers 5 saves rope_theta in it
    text_class: Any = LlamaConfig if internlm2 else Qwen2Config
    port_config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision["hidden_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"],
            attention_bias=vision.get("qkv_bias", False),
            use_qk_norm=vision.get("qk_normalization", True),
            norm_type=vision.get("norm_type", "rms_norm"),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            image_size=[vision["image_size"]] * 2,
            patch_size=[vision["patch_size"]] * 2,
            use_mean_pooling=True,
            use_absolute_position_embeddings=True,
            hidden_act="gelu",
        ),
        text_config=text_class(
            hidden_size=llm["hidden_size"],
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm["num_key_value_heads"],
            head_dim=llm["hidden_size"] // llm["num_attention_heads"],
            intermediate_size=llm["intermediate_size"],
            vocab_size=llm["vocab_size"],
            rms_norm_eps=llm.get("rms_norm_eps", 1e-6),
            max_position_embeddings=llm.get("max_position_embeddings", 32768),
            rope_parameters={"rope_type": "default", "rope_theta": rope.get("rope_theta", 1e4)},
            tie_word_embeddings=False,
        ),
        image_token_id=image_token_id,
        downsample_ratio=config["downsample_ratio"],
        tie_word_embeddings=False,
    )
    port_config._attn_implementation = "eager"
    return port_config


def _plain(name: str) -> str:
    """A tensor's name without what peft puts into it."""
    return name.replace(".base_model.model.", ".", 1).replace(".base_layer.", ".")


def _port_names(name: str) -> list[str]:
    """The port's parameters that an original tensor holds: one, or q, k and v."""
    if name.startswith("language_model."):
        return _port_llm_names(name.removeprefix("language_model."))
    for pattern, replacement in _VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    if ".attn.qkv." in name:
        return [name.replace(".attn.qkv.", f".attention.{letter}_proj.") for letter in "qkv"]
    return [name]


def _port_llm_names(name: str) -> list[str]:
    if name in ("lm_head.weight", "output.weight"):
        return ["lm_head.weight"]
    name = "model.language_model." + name.removeprefix("model.")
    for ours, theirs in _INTERNLM2_NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    if ".attention.wqkv." in name:
        return [name.replace("attention.wqkv", f"self_attn.{letter}_proj") for letter in "qkv"]
    return [name]


def _numpy(tensor: torch.Tensor) -> Array:
    array: Array = tensor.float().numpy()
    return array


def _added_tokens(checkpoint: Path) -> dict[str, int]:
    path = checkpoint / "added_tokens.json"
    added: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
    return added
