"""The compiled language model against transformers in fp32: greedy, on text and on visual features.

The engine runs in a process of its own: importing tensorrt_llm starts MPI, and the servers of the
other tests start theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from build.machine import Machine
from internvl_triton.artifacts import LLMBuild
from internvl_triton.limits import Limits
from internvl_triton.model_spec import LLMFamily, ModelSpec
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

pytestmark = pytest.mark.gpu

ANSWER_TOKENS = 24
NUM_VISUAL = 40
# Two runs whose logits differ by less than 0.25 (bf16 against fp32) can choose another token only
# where the reference's best leads by less than twice as much.
MAX_LEAD = 0.5

# argv: engine, table (.npy), JSON list of prompts; prints the answers as JSON in its last line.
RUN_ENGINE = """
import json, sys
import numpy as np, torch
from tensorrt_llm.runtime import ModelRunnerCpp
engine, table, prompts = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
runner = ModelRunnerCpp.from_dir(engine, max_tokens_in_paged_kv_cache=4096)
ids = [torch.tensor(prompt, dtype=torch.int32) for prompt in prompts]
output = runner.generate(
    ids, max_new_tokens=%d, end_id=-1, pad_id=0, top_k=1, prompt_table=torch.from_numpy(table)[None]
)
answers = [
    row[0, len(prompt) : len(prompt) + %d].tolist()
    for row, prompt in zip(output.cpu(), prompts, strict=True)
]
print(json.dumps(answers))
""" % (ANSWER_TOKENS, ANSWER_TOKENS)  # noqa: UP031


@dataclass(frozen=True)
class Built:
    """table: float32 (NUM_VISUAL, hidden), what the virtual ids vocab_size + k stand for."""

    engine: Path
    checkpoint: Path
    spec: ModelSpec
    table: np.ndarray


@pytest.fixture(scope="module", params=["qwen2", "internlm2"])
def built(request, tmp_path_factory, machine: Machine) -> Built:
    from build.llm_engine import build_llm_engine
    from export import export_llm

    family: LLMFamily = request.param
    folder: Path = tmp_path_factory.mktemp(f"gpu_llm_{family}")
    config = tiny_config(family, "300m", llm_layers=4)
    checkpoint = write_random_checkpoint(folder / "checkpoint", config)
    spec = ModelSpec.from_config(config)
    converted = export_llm(checkpoint, folder / "llm", tp_size=1, progress=False)
    limits = Limits.for_model(spec, max_seq_len=2048, max_batch_size=4)
    build_llm_engine(
        converted, folder / "engine", spec=spec, limits=limits, llm=LLMBuild("bf16", 1)
    )
    random = np.random.default_rng(0)
    table = random.standard_normal((NUM_VISUAL, spec.llm.hidden_size), np.float32)
    return Built(folder / "engine", checkpoint, spec, table)


def prompts_of(spec: ModelSpec) -> list[list[int]]:
    """Text alone, visual features inside text, and one long enough for several KV blocks."""
    random = np.random.default_rng(1)
    text = random.integers(300, 1200, 300).tolist()
    visual = [spec.llm.vocab_size + k for k in range(NUM_VISUAL)]
    return [text[:7], [*text[:5], *visual, *text[5:9]], [*text[:150], *visual, *text[150:]]]


def test_every_greedy_token_is_one_of_transformers(built: Built, tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", built.table)
    prompts = prompts_of(built.spec)
    done = subprocess.run(
        [
            *(sys.executable, "-c", RUN_ENGINE, str(built.engine)),
            *(str(tmp_path / "table.npy"), json.dumps(prompts)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == ANSWER_TOKENS
        assert worst_lead(built, prompt, answer, tmp_path / "hf") < MAX_LEAD


def worst_lead(built: Built, prompt: list[int], answer: list[int], folder: Path) -> float:
    """How far, in logits, transformers' own choice is above a token of the answer, at most."""
    import torch
    from transformers import AutoModelForCausalLM

    from export import export_hf_llm

    if not folder.exists():
        export_hf_llm(built.checkpoint, folder, as_llama=True, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = torch.tensor([*prompt, *answer[:-1]])
    visual = ids >= built.spec.llm.vocab_size
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids.where(~visual, 0))
        table = torch.from_numpy(built.table).bfloat16().float()
        embedded[visual] = table[ids[visual] - built.spec.llm.vocab_size]
        logits = model(inputs_embeds=embedded[None]).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max())
