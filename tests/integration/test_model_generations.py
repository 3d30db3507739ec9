"""InternVL2 and InternVL3: from conversion to the served answer, each step against the reference.

The checkpoints are random and small, but their config.json is the published size's apart from the
sizes in SMALL: template, vocabulary, rope scaling, norms and biases are its own. Qwen's vocabulary
is the real one, so `<img>` is 151646 in InternVL2 and 151665 in InternVL3.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from build.engines import build_engines
from build.parity.questions import verification_questions
from build.verify import main
from internvl_triton.published_models import published_config
from internvl_triton.random_checkpoint import write_random_checkpoint
from internvl_triton.tokenizer import load_tokenizer
from tests.real_qwen import FIRST_IMAGE_TOKEN, write_qwen_tokenizer

pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
pytestmark = [pytest.mark.triton, pytest.mark.slow]

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
TEXT, ONE_TILE, _, TWO_TURNS = verification_questions()


def small_checkpoint(directory: Path, name: str, *, vocab_size: int | None) -> Path:
    """vocab_size: of a tiny tokenizer; None has Qwen's real one."""
    config = published_config(name)
    config["vision_config"] |= {**SMALL, "intermediate_size": 128}
    config["llm_config"] |= {**SMALL, "num_key_value_heads": 1, "intermediate_size": 128}
    if vocab_size:
        config["llm_config"]["vocab_size"] = vocab_size
    write_random_checkpoint(directory, config, tokenizer=vocab_size is not None)
    if not vocab_size:
        generation = name.partition("-")[0]
        write_qwen_tokenizer(directory, generation=generation)
        found = load_tokenizer(directory).special_id("<img>")
        assert found == FIRST_IMAGE_TOKEN[generation]
    return directory


@pytest.mark.parametrize(
    ("name", "tp_size", "vocab_size"),
    [
        ("InternVL2-1B", 1, None),  # InternViT-300M, Qwen2, Hermes-2
        ("InternVL2-26B", 2, 1283),  # InternViT-6B, InternLM2, internlm2-chat
        ("InternVL3-8B", 2, None),  # InternViT-300M, Qwen2.5, a rope scaling that changes nothing
    ],
)
def test_another_generation_is_served_as_the_reference(
    name: str,
    tp_size: int,
    vocab_size: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = small_checkpoint(tmp_path / name, name, vocab_size=vocab_size)
    artifacts = build_engines(
        f"{checkpoint}/.",  # not the published name: a directory
        tp_size=tp_size,
        profile="cpu",
        artifacts_dir=tmp_path / "artifacts",
        progress=False,
    )
    for module in ("build.verify", "build.verify_engines"):
        asked = [TEXT, ONE_TILE, TWO_TURNS]
        monkeypatch.setattr(f"{module}.verification_questions", lambda asked=asked: asked)
    options = [f"--model={checkpoint}/.", f"--tp-size={tp_size}", "--profile=cpu"]
    assert main([*options, f"--artifacts={tmp_path / 'artifacts'}"]) == 0, capsys.readouterr().out
    folder = artifacts.root / "certificates" / f"bf16-tp{tp_size}-cpu"
    checks = json.loads((folder / "certificate.json").read_text())["checks"]
    measured = {check["name"]: check for check in checks}
    assert list(measured)[2:] == ["token ids", "visual features", "logits", "greedy agreement"]
    assert measured["greedy agreement"]["of"].endswith("of 3 answers")


def test_the_reference_prompts_of_the_generations_differ() -> None:
    """Otherwise a template that is mixed up would not be noticed above."""
    from tests.reference import reference_prompt

    prompts = {
        template: reference_prompt([("a", "b")], "c", template=template)
        for template in ("internvl2_5", "Hermes-2", "internlm2-chat")
    }
    assert prompts["Hermes-2"] == prompts["internlm2-chat"]
    assert prompts["internvl2_5"] != prompts["Hermes-2"]
    assert "<|im_end|>\n" not in prompts["Hermes-2"]
