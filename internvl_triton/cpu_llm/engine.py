"""The engine behind the `tensorrt_llm` step of the cpu profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from internvl_triton.cpu_llm.prefix_cache import PrefixCache
from internvl_triton.cpu_llm.scheduler import Scheduler
from internvl_triton.cpu_llm.transformer import Transformer
from internvl_triton.errors import ArtifactMismatch
from internvl_triton.guides import GuideCompiler
from internvl_triton.tokenizer import Tokenizer

__all__ = ["CpuLlmEngine"]


class CpuLlmEngine(Scheduler):
    """A TensorRT-LLM checkpoint, served by in-flight batching in numpy and float32.

    max_batch_size: requests that generate at the same time. max_seq_len: prompt + answer, tokens.
    max_visual_tokens: rows of one request's prompt table. max_queue_size: requests that wait.
    prefix_cache_bytes: keys and values kept of past prompts and answers; 0 keeps none.
    tokenizer: for requests with a guide; without one they are refused.
    on_change: see `Scheduler`.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        *,
        max_batch_size: int,
        max_seq_len: int,
        max_visual_tokens: int,
        max_queue_size: int,
        prefix_cache_bytes: int = 0,
        tokenizer: Tokenizer | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        """Raises ArtifactMismatch when the checkpoint cannot be executed up to max_seq_len."""
        model = Transformer.from_checkpoint(checkpoint_dir, max_seq_len=max_seq_len)
        positions = model.spec.max_position_embeddings
        if max_seq_len > positions:
            raise ArtifactMismatch(
                f"max_seq_len {max_seq_len} exceeds the model's {positions} positions; "
                f"use at most {positions}"
            )
        super().__init__(
            model,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_visual_tokens=max_visual_tokens,
            max_queue_size=max_queue_size,
            guides=(
                None if tokenizer is None else GuideCompiler(tokenizer, vocab_size=model.vocab_size)
            ),
            prefix_cache=(
                PrefixCache(prefix_cache_bytes, vocab_size=model.vocab_size)
                if prefix_cache_bytes
                else None
            ),
            on_change=on_change,
        )
