"""The references of the GPU tests, checked where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from export import export_llm
from internvl_triton.cpu_llm.transformer import Segment, Transformer
from internvl_triton.model_spec import LLMFamily, ModelSpec
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from tests.gpu.test_llm_engine import MAX_LEAD, NUM_VISUAL, Built, prompts_of, worst_lead
from tests.oracle import Oracle


@pytest.mark.parametrize("vit", ["300m", "6b"])
def test_the_plain_vision_tower_is_the_ports(vit: Literal["300m", "6b"], tmp_path: Path) -> None:
    from tests.gpu.pytorch_vit import visual_features

    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config("qwen2", vit))
    tiles = np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), np.uint8)
    expected = Oracle(checkpoint).visual_features(tiles)
    np.testing.assert_allclose(visual_features(checkpoint, tiles), expected, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_the_lead_is_nothing_for_the_same_answer_only(family: LLMFamily, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config(family, "300m"))
    spec = ModelSpec.from_checkpoint(checkpoint)
    table = np.random.default_rng(0).standard_normal((NUM_VISUAL, 256), np.float32)
    table = (table.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # bfloat16
    built = Built(tmp_path / "engine", checkpoint, spec, table)
    model = Transformer.from_checkpoint(
        export_llm(checkpoint, tmp_path / "llm", tp_size=1, progress=False), max_seq_len=1024
    )
    for prompt in prompts_of(spec):
        caches = model.new_caches()
        segment = Segment(np.array(prompt, np.int32), caches, table)
        answer: list[int] = []
        while len(answer) < 6:
            answer.append(int(model.logits(model.forward([segment])[-1:]).argmax()))
            segment = Segment(np.array(answer[-1:], np.int32), caches)
        assert worst_lead(built, prompt, answer, tmp_path / "hf") < 1e-3
        wrong = [*answer[:-1], (answer[-1] + 1) % spec.llm.vocab_size]
        assert worst_lead(built, prompt, wrong, tmp_path / "hf") > MAX_LEAD
