"""Facts of one checkpoint, read from its config.json with the class defaults that absent keys take.

The defaults are those of `InternVisionConfig`, `InternVLChatConfig`, `Qwen2Config` and
`InternLM2Config` in OpenGVLab/InternVL @ 2410d1d and transformers: a key that a published
config.json leaves out (such as `norm_type` in InternViT-6B's) means the class default there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from internvl_triton.errors import (
    IncompleteCheckpoint,
    InvalidCheckpoint,
    InvalidTensorParallel,
    UnsupportedCheckpoint,
)

__all__ = ["LLMSpec", "ModelSpec", "VisionSpec", "exact_div"]

TP_SIZES = (1, 2, 4, 8)

LLMFamily = Literal["qwen2", "internlm2"]
NormType = Literal["layer_norm", "rms_norm"]

_FAMILIES: dict[str, LLMFamily] = {
    "Qwen2ForCausalLM": "qwen2",
    "qwen2": "qwen2",
    "InternLM2ForCausalLM": "internlm2",
    "internlm2": "internlm2",
}
# What is not converted, and why: language model -> the checkpoints that have it.
_OTHER_LLMS = {
    "Phi3ForCausalLM": "Phi-3, of InternVL2-4B, has fused projections and another chat format",
    "LlamaForCausalLM": "Llama, of InternVL2-40B and -Llama3-76B, comes with other tokenizers",
    "InternLM3ForCausalLM": "InternLM3, of InternVL3-9B, is no class of TensorRT-LLM 0.21",
    "Qwen3ForCausalLM": "Qwen3, of InternVL3.5, normalises queries and keys",
    "Qwen3MoeForCausalLM": "Qwen3-MoE, of the large InternVL3.5 sizes, has experts",
    "GptOssForCausalLM": "GPT-OSS, of InternVL3.5-GPT-OSS, is no class of TensorRT-LLM 0.21",
}
TEMPLATES = ("internvl2_5", "Hermes-2", "internlm2-chat")
_DTYPES = ("bfloat16", "float16", "float32")


class _Section:
    """One object of config.json whose values are checked as they are read.

    An absent key takes `default`; without one it is an error. null is no value.
    """

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self._name = name
        self._values = values

    def integer(self, key: str, default: int | None = None, *, minimum: int | None = 1) -> int:
        value = self._get(key, default)
        if type(value) is not int or (minimum is not None and value < minimum):
            self._refuse(key, value, "an integer" + (f" >= {minimum}" if minimum else ""))
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Above 0."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self._refuse(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return bool(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key, default)
        if value is None and key not in self._values:
            raise InvalidCheckpoint(f"{self._name} has no {key!r}")
        return value

    def _refuse(self, key: str, value: object, wanted: str) -> NoReturn:
        raise InvalidCheckpoint(f"{self._name}: {key} is {value!r}; it must be {wanted}")


def exact_div(numerator: int, denominator: int, what: str) -> int:
    """numerator / denominator as an int. Raises InvalidCheckpoint when it does not divide."""
    if denominator <= 0 or numerator % denominator:
        raise InvalidCheckpoint(f"{what}: {numerator} is not divisible by {denominator}")
    return numerator // denominator


@dataclass(frozen=True)
class VisionSpec:
    """InternViT. `num_layers` is the number of layers that are run (after `select_layer`)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_type: NormType
    qk_normalization: bool
    qkv_bias: bool
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return exact_div(self.hidden_size, self.num_heads, "vision hidden_size / heads")

    @property
    def patches_per_side(self) -> int:
        return exact_div(self.image_size, self.patch_size, "image_size / patch_size")

    @property
    def num_positions(self) -> int:
        """Patches of one tile plus the class token: 32 * 32 + 1 = 1025 at 448 pixels."""
        return self.patches_per_side**2 + 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, select_layer: int) -> VisionSpec:
        section = _Section("vision_config", config)
        norm_type = config.get("norm_type", "rms_norm")
        if norm_type not in ("layer_norm", "rms_norm"):
            raise UnsupportedCheckpoint(
                f"vision_config.norm_type is {norm_type!r}; supported: layer_norm, rms_norm"
            )
        _require_equal(config, "vision_config", "hidden_act", "gelu", default="gelu")
        _require_equal(config, "vision_config", "num_channels", 3, default=3)
        total_layers = section.integer("num_hidden_layers", 48)
        # hidden_states has one entry before the first layer, so [-1] is after the last layer.
        num_layers = total_layers + 1 + select_layer if select_layer < 0 else select_layer
        if not 1 <= num_layers <= total_layers:
            raise InvalidCheckpoint(
                f"select_layer {select_layer} is outside the {total_layers} vision layers"
            )
        return cls(
            hidden_size=section.integer("hidden_size", 3200),
            num_layers=num_layers,
            num_heads=section.integer("num_attention_heads", 25),
            intermediate_size=section.integer("intermediate_size", 12800),
            image_size=section.integer("image_size", 224),
            patch_size=section.integer("patch_size", 14),
            norm_type=norm_type,
            qk_normalization=section.flag("qk_normalization", True),
            qkv_bias=section.flag("qkv_bias", False),
            layer_norm_eps=section.number("layer_norm_eps", 1e-6),
        )


@dataclass(frozen=True)
class LLMSpec:
    """Qwen2 or InternLM2. Both are the Llama architecture; Qwen2 adds biases on q, k and v."""

    family: LLMFamily
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    max_position_embeddings: int

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def valid_tp_sizes(self) -> tuple[int, ...]:
        """TP sizes that split query heads, kv heads (or duplicate them) and MLP evenly."""
        return tuple(
            tp
            for tp in TP_SIZES
            if self.num_heads % tp == 0
            and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)
            and self.intermediate_size % tp == 0
        )

    def check_tp_size(self, tp_size: int) -> None:
        """Raise InvalidTensorParallel, with the sizes that work, unless tp_size is one of them."""
        if tp_size not in self.valid_tp_sizes:
            allowed = ", ".join(map(str, self.valid_tp_sizes))
            raise InvalidTensorParallel(
                f"tp_size {tp_size} cannot split this model ({self.num_heads} attention heads, "
                f"{self.num_kv_heads} kv heads, intermediate size {self.intermediate_size}); "
                f"use TP = {allowed}"
            )

    def padded_vocab_size(self, tp_size: int) -> int:
        """vocab_size rounded up to a multiple of tp_size, as TensorRT-LLM's `pad_vocab_size`."""
        return -(-self.vocab_size // tp_size) * tp_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LLMSpec:
        section = _Section("llm_config", config)
        architectures = config.get("architectures") or [config.get("model_type", "")]
        name = architectures[0] if isinstance(architectures, list) else architectures
        if not isinstance(name, str) or name not in _FAMILIES:
            why = f" ({_OTHER_LLMS[name]})" if name in _OTHER_LLMS else ""
            raise UnsupportedCheckpoint(
                f"language model {name!r} is not supported{why}; "
                "supported: Qwen2ForCausalLM, InternLM2ForCausalLM"
            )
        family = _FAMILIES[name]
        if family == "internlm2" and section.flag("bias", True):
            raise UnsupportedCheckpoint(
                "llm_config.bias is true (or absent, which means true) for InternLM2; "
                "InternVL2.5 checkpoints have false"
            )
        if family == "qwen2" and section.flag("use_sliding_window", False):
            raise UnsupportedCheckpoint("llm_config.use_sliding_window true is not supported")
        _require_equal(config, "llm_config", "hidden_act", "silu", default="silu")
        hidden_size = section.integer("hidden_size")
        num_heads = section.integer("num_attention_heads")
        num_kv_heads = num_heads
        if config.get("num_key_value_heads") is not None:
            num_kv_heads = section.integer("num_key_value_heads")
            exact_div(num_heads, num_kv_heads, "llm_config: attention heads / key-value heads")
        if config.get("head_dim") is None:
            head_dim = exact_div(hidden_size, num_heads, "llm_config: hidden_size / heads")
        else:
            head_dim = section.integer("head_dim")
        return cls(
            family=family,
            hidden_size=hidden_size,
            num_layers=section.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=section.integer("intermediate_size"),
            vocab_size=section.integer("vocab_size"),
            rope_theta=_rope_theta(config),
            norm_eps=section.number("rms_norm_eps", 1e-6),
            max_position_embeddings=section.integer(
                "max_position_embeddings", 32768 if family == "qwen2" else 2048
            ),
        )


@dataclass(frozen=True)
class ModelSpec:
    """One InternVL checkpoint: both towers, tiling and prompt facts.

    template: the conversation template of the reference, see `prompt.TEMPLATES`.
    """

    vision: VisionSpec
    llm: LLMSpec
    dtype: str
    downsample_ratio: float
    ps_version: Literal["v1", "v2"]
    max_tiles: int
    use_thumbnail: bool
    system_message: str | None
    template: str = "internvl2_5"

    @property
    def tile_size(self) -> int:
        return self.vision.image_size

    @property
    def shuffle_factor(self) -> int:
        """Patches per side that pixel shuffle merges into one visual token: 1 / 0.5 = 2."""
        factor = round(1 / self.downsample_ratio)
        if factor < 1 or abs(factor * self.downsample_ratio - 1) > 1e-9:
            raise InvalidCheckpoint(
                f"downsample_ratio {self.downsample_ratio} is not 1 over an integer"
            )
        return factor

    @property
    def tokens_per_tile(self) -> int:
        """(448 / 14 * 0.5)^2 = 16^2 = 256."""
        side = exact_div(
            self.vision.patches_per_side, self.shuffle_factor, "patches per side / shuffle factor"
        )
        return side**2

    @property
    def max_tiles_with_thumbnail(self) -> int:
        """12 tiles + thumbnail = 13."""
        return self.max_tiles + (1 if self.use_thumbnail and self.max_tiles > 1 else 0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Raises UnsupportedCheckpoint (another architecture) or InvalidCheckpoint."""
        top = _Section("config.json", config)
        model_type = config.get("model_type")
        if model_type == "internvl":
            raise UnsupportedCheckpoint(
                "config.json has model_type 'internvl', transformers' own format with other names "
                "of tensors; use the same model in OpenGVLab's original format: the repository "
                "without '-hf' at its end, model_type 'internvl_chat'"
            )
        if model_type != "internvl_chat":
            raise UnsupportedCheckpoint(
                f"config.json has model_type {model_type!r}; this project converts OpenGVLab's "
                "original format, model_type 'internvl_chat'"
            )
        template = config.get("template")
        if template not in TEMPLATES:
            raise UnsupportedCheckpoint(
                f"config.json has template {template!r}; supported: 'internvl2_5' (InternVL2.5 and "
                "InternVL3), 'Hermes-2' and 'internlm2-chat' (InternVL2)"
            )
        for key in ("llm_config", "vision_config"):
            if not isinstance(config.get(key), Mapping):
                raise InvalidCheckpoint(f"config.json has no {key!r}")
        _refuse_quantised(config)
        if top.flag("pad2square", False):
            raise UnsupportedCheckpoint("config.json has pad2square=true, which is not supported")
        vision = VisionSpec.from_config(
            config["vision_config"], select_layer=top.integer("select_layer", -1, minimum=None)
        )
        forced = vision.image_size
        if config.get("force_image_size") is not None:
            forced = top.integer("force_image_size")
        if forced != vision.image_size:
            raise UnsupportedCheckpoint(
                f"force_image_size {forced} differs from vision_config.image_size "
                f"{vision.image_size}: position embeddings would have to be interpolated"
            )
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "float32")
        if dtype not in _DTYPES:
            raise UnsupportedCheckpoint(
                f"config.json has torch_dtype {dtype!r}; supported: {', '.join(_DTYPES)}"
            )
        ps_version = config.get("ps_version", "v1")
        if ps_version not in ("v1", "v2"):
            raise UnsupportedCheckpoint(f"ps_version {ps_version!r} is neither 'v1' nor 'v2'")
        system_message = config.get("system_message")
        if not isinstance(system_message, str | None):
            raise InvalidCheckpoint(
                f"config.json: system_message is {system_message!r}; it must be a text"
            )
        dynamic = top.flag("dynamic_image_size", False)
        spec = cls(
            vision=vision,
            llm=LLMSpec.from_config(config["llm_config"]),
            dtype=dtype,
            downsample_ratio=top.number("downsample_ratio", 0.5),
            ps_version=ps_version,
            max_tiles=top.integer("max_dynamic_patch", 6) if dynamic else 1,
            use_thumbnail=top.flag("use_thumbnail", False),
            system_message=system_message,
            template=template,
        )
        _ = spec.tokens_per_tile, vision.head_dim  # divisibility is checked here, once
        return spec

    @classmethod
    def from_checkpoint(cls, directory: Path) -> ModelSpec:
        """Read `directory`/config.json. Raises IncompleteCheckpoint when it is missing."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise IncompleteCheckpoint(f"{directory} has no config.json: not a checkpoint")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidCheckpoint(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise InvalidCheckpoint(f"{path} holds no JSON object: not a checkpoint's")
        return cls.from_config(config)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, where its scaling changes nothing.

    transformers 5 saves base and scaling together as `rope_parameters`, earlier versions apart.
    Dynamic NTK is the identity up to max_position_embeddings, which bounds max_seq_len here.
    """
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        if not isinstance(scaling, Mapping):
            raise InvalidCheckpoint(f"llm_config: {key} is {scaling!r}; it must be an object")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "dynamic"):
            raise UnsupportedCheckpoint(
                f"llm_config.{key} type {kind!r} is not supported; supported: null, dynamic"
            )
    together = config.get("rope_parameters") or {}
    if "rope_theta" in together:
        return _Section("llm_config.rope_parameters", together).number("rope_theta")
    return _Section("llm_config", config).number("rope_theta", 10000.0)


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedCheckpoint for weights that somebody has quantised already."""
    for section in (config, config["llm_config"]):
        if quantised := section.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise UnsupportedCheckpoint(
                f"the checkpoint is quantised already ({method}); use the unquantised one, and "
                "PRECISION=int8, int4, int4_awq, fp8 or int8_sq to quantise it"
            )


def _require_equal(
    config: Mapping[str, Any], section: str, key: str, value: object, *, default: object
) -> None:
    given = config.get(key, default)
    if given != value:
        raise UnsupportedCheckpoint(f"{section}.{key} is {given!r}; supported: {value!r}")
