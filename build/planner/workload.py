"""The requests that a deployment is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from internvl_triton.model_spec import ModelSpec

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """What every request looks like. text_tokens: template, question and <img> marks."""

    num_images: int
    tiles_per_image: int
    text_tokens: int
    output_tokens: int

    @property
    def num_tiles(self) -> int:
        return self.num_images * self.tiles_per_image

    def prompt_tokens(self, spec: ModelSpec) -> int:
        return self.text_tokens + self.num_tiles * spec.tokens_per_tile

    def total_tokens(self, spec: ModelSpec) -> int:
        return self.prompt_tokens(spec) + self.output_tokens
