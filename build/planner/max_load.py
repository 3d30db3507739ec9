"""Tokens per second when the batch is always full: in-flight batching under maximum load."""

from __future__ import annotations

from dataclasses import dataclass

from build.planner.llm_time import LLMTime, TimeParts

__all__ = ["MaxLoad", "max_load"]


@dataclass(frozen=True)
class MaxLoad:
    """One wave: batch_size requests are prefilled, then all decode output_tokens steps.

    With in-flight batching the requests are spread over it instead, which takes as long.
    """

    batch_size: int
    output_tokens: int
    vision_s: float  # of all requests of the wave
    prefill: TimeParts  # of all of them
    step: TimeParts

    @property
    def wave_s(self) -> float:
        return self.vision_s + self.prefill.total_s + self.output_tokens * self.step.total_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.batch_size * self.output_tokens / self.wave_s

    @property
    def requests_per_s(self) -> float:
        return self.batch_size / self.wave_s

    def shares(self) -> dict[str, float]:
        """Of the wave's time, by part; they add up to 1."""
        step = self.step
        seconds = {
            "vision": self.vision_s,
            "prefill": self.prefill.total_s,
            "decode: weights": self.output_tokens * step.matmul_s,
            "decode: KV cache": self.output_tokens * step.attention_s,
            "decode: all-reduce": self.output_tokens * step.all_reduce_s,
            "decode: overhead": self.output_tokens * step.overhead_s,
        }
        return {part: value / self.wave_s for part, value in seconds.items()}


def max_load(
    llm: LLMTime,
    *,
    batch_size: int,
    prompt_tokens: int,
    output_tokens: int,
    vision_s_per_request: float = 0.0,
) -> MaxLoad:
    """A sequence has, on average over its answer, prompt_tokens + output_tokens / 2 tokens."""
    return MaxLoad(
        batch_size=batch_size,
        output_tokens=output_tokens,
        vision_s=batch_size * vision_s_per_request,
        prefill=llm.prefill(prompt_tokens, batch_size),
        step=llm.step(batch_size, prompt_tokens + output_tokens / 2),
    )
