"""What one deployment accepts: built into its engines, written into its configs and manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import ModelSpec

__all__ = ["Limits"]


_MAY_BE_ZERO = ("max_queue_size", "feature_cache_bytes", "prefix_cache_bytes")


@dataclass(frozen=True)
class Limits:
    # language model
    max_seq_len: int  # prompt + answer, tokens
    max_batch_size: int = 8  # requests generating at the same time
    max_queue_size: int = 64  # requests waiting for a place in the batch
    default_max_tokens: int = 1024  # answer length when the request gives none
    prefix_cache_bytes: int = 512 * 2**20  # cpu profile: keys and values kept of past prompts
    max_logits_bytes: int = 512 * 2**20  # of one answer with top_logprobs, over the vocabulary
    max_kv_cache_tokens: int = 65536  # gpu profile: see kv_cache_tokens
    # vision
    max_tiles_per_request: int = 64
    max_tiles_per_run: int = 26  # gpu profile: largest run of the vision engine, two pictures
    feature_cache_bytes: int = 256 * 2**20
    # media
    max_images: int = 64
    max_image_bytes: int = 32 * 2**20
    max_image_pixels: int = 100_000_000
    max_videos: int = 4
    max_video_bytes: int = 256 * 2**20
    max_video_frames: int = 36_000  # decoded to sample from: 10 minutes at 60 frames/s
    max_text_bytes: int = 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            minimum = 0 if field.name in _MAY_BE_ZERO else 1
            if not isinstance(value, int) or value < minimum:
                raise BuildFailed(f"{field.name} is {value!r}; it must be an integer >= {minimum}")

    @classmethod
    def for_model(cls, spec: ModelSpec, **overrides: int) -> Limits:
        """Defaults for `spec`; max_seq_len is the model's max_position_embeddings, at most 32768.

        Raises BuildFailed when max_seq_len exceeds the positions the model was trained for, or
        one picture at the model's max_tiles would not fit into max_tiles_per_request or into
        max_tiles_per_run.
        """
        positions = min(spec.llm.max_position_embeddings, 32768)
        picture = spec.max_tiles_with_thumbnail
        defaults = {
            "max_seq_len": positions,
            "max_tiles_per_run": max(cls.max_tiles_per_run, picture),
        }
        limits = cls(**{**defaults, **overrides})
        if limits.max_seq_len > positions:
            raise BuildFailed(
                f"max_seq_len {limits.max_seq_len} exceeds the model's {positions} positions"
            )
        for name in ("max_tiles_per_request", "max_tiles_per_run"):
            if getattr(limits, name) < picture:
                raise BuildFailed(
                    f"{name} {getattr(limits, name)} is below the "
                    f"{picture} tiles of one picture of this model"
                )
        return limits

    def max_visual_tokens(self, spec: ModelSpec) -> int:
        """Rows of the largest prompt table of one request."""
        return self.max_tiles_per_request * spec.tokens_per_tile

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens whose keys and values the GPUs hold at once, explicit so that the memory of the
        vision engine is safe: every request at full length, at most max_kv_cache_tokens, but
        always one request of max_seq_len.
        """
        everything = self.max_batch_size * self.max_seq_len
        return min(everything, max(self.max_kv_cache_tokens, self.max_seq_len))

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Limits:
        return cls(**values)
