"""int8 and int4 on the CPU engine against transformers' port run with dequantised weights.

The reference quantises and dequantises the original checkpoint by itself, one formula for one
matrix, so a wrong axis, scale or half of a byte in the engine shows in the logits.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from export import export_llm
from internvl_triton.cpu_llm.rank_weights import LayerWeights
from internvl_triton.cpu_llm.transformer import Transformer
from internvl_triton.cpu_llm.weight_only import QuantizedWeight
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from tests.oracle import Oracle
from tests.parity.test_cpu_transformer import (
    ANSWER_TOKENS,
    LOGITS_TOLERANCE,
    Prompt,
    all_logits,
    broken,
    logits_and_answer,
    make_prompt,
)

pytestmark = pytest.mark.slow

PROMPTS = {"text-only": [57], "1-tile": [19, -1, 23], "2-images": [11, -1, 5, -2, 17]}
# Their inputs are divided among ranks, and every rank has its own scales.
ROW_SPLIT = ("o_proj.weight", "down_proj.weight", "attention.wo.weight", "feed_forward.w2.weight")
COLUMN_SPLIT = (
    *("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"),
    *("attention.wqkv.weight", "feed_forward.w1.weight", "feed_forward.w3.weight"),
)
BITS = {"int8": 8, "int4": 4}


def quantise_and_dequantise(matrix: np.ndarray, bits: int) -> np.ndarray:
    """(out, in), one scale per row: max|row| / 2^(bits-1), rounded to bfloat16 when multiplied."""
    limit = 2 ** (bits - 1)
    scale = np.abs(matrix.astype(np.float32)).max(axis=1, keepdims=True) / np.float32(limit)
    quotient = (matrix.astype(np.float32) / scale).astype(np.float64)
    integers = np.clip(np.sign(quotient) * np.floor(np.abs(quotient) + 0.5), -limit, limit - 1)
    return (integers * scale.astype(matrix.dtype).astype(np.float64)).astype(np.float32)


def dequantised_checkpoint(source: Path, target: Path, bits: int, tp_size: int) -> Path:
    """A float32 copy whose layer matrices went through quantisation as `tp_size` ranks do it."""
    shutil.copytree(source, target)
    tensors = {}
    with safe_open(source / "model.safetensors", framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            tensor = opened.get_tensor(name)
            if name.startswith("language_model.") and name.endswith(COLUMN_SPLIT):
                tensor = quantise_and_dequantise(tensor, bits)
            elif name.startswith("language_model.") and name.endswith(ROW_SPLIT):
                parts = np.split(tensor, tp_size, axis=1)
                parts = [quantise_and_dequantise(part, bits) for part in parts]
                tensor = np.concatenate(parts, axis=1)
            tensors[name] = tensor.astype(np.float32)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return target


class Model:
    """One checkpoint, its engines and its references, each made when it is first needed."""

    def __init__(self, root: Path, family: str, vit: str) -> None:
        self.root = root
        self.checkpoint = write_random_checkpoint(root / "checkpoint", tiny_config(family, vit))
        self.oracle = Oracle(self.checkpoint)
        self._engines: dict[tuple[str, int], Transformer] = {}
        self._references: dict[tuple[str, int], Oracle] = {}

    def engine(self, precision: str, tp_size: int) -> Transformer:
        key = precision, tp_size
        if key not in self._engines:
            directory = self.root / f"{precision}-tp{tp_size}"
            export_llm(
                self.checkpoint, directory, tp_size=tp_size, precision=precision, progress=False
            )
            self._engines[key] = Transformer.from_checkpoint(directory, max_seq_len=4096)
        return self._engines[key]

    def reference(self, precision: str, tp_size: int) -> Oracle:
        key = precision, tp_size
        if key not in self._references:
            target = self.root / f"dequantised-{precision}-tp{tp_size}"
            self._references[key] = Oracle(
                dequantised_checkpoint(self.checkpoint, target, BITS[precision], tp_size)
            )
        return self._references[key]

    def prompt(self, name: str) -> Prompt:
        return make_prompt(self.oracle, PROMPTS[name], seed=len(name))


@pytest.fixture(
    scope="module", params=[("qwen2", "300m"), ("internlm2", "6b")], ids=["qwen2", "internlm2"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp(request.param[0]), *request.param)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", PROMPTS)
def test_parity(model: Model, name: str, precision: str, tp_size: int) -> None:
    prompt = model.prompt(name)
    logits, answer = logits_and_answer(model.engine(precision, tp_size), prompt)
    expected = model.reference(precision, tp_size).logits(
        prompt.oracle_ids + answer[:-1], prompt.tiles
    )
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < LOGITS_TOLERANCE
    choices = expected[len(prompt.ids) - 1 :]
    assert len(choices) == ANSWER_TOKENS
    runners_up, best = np.sort(choices, axis=1)[:, -2:].T
    assert (best - runners_up).min() > 2 * LOGITS_TOLERANCE  # so the ids below mean something
    assert choices.argmax(axis=1).tolist() == answer


@pytest.mark.parametrize(("precision", "least", "most"), [("int8", 0.01, 0.5), ("int4", 0.5, 6)])
def test_quantisation_is_real(model: Model, precision: str, least: float, most: float) -> None:
    """The logits move, by more with fewer bits: their standard deviation is about 4."""
    prompt = model.prompt("text-only")
    change = all_logits(model.engine(precision, 1), prompt) - model.oracle.logits(prompt.oracle_ids)
    assert least < np.abs(change).max()
    assert np.sqrt(np.mean(np.square(change))) < most


def test_scales_of_every_rank_differ_from_those_of_the_whole(model: Model) -> None:
    """As NVIDIA quantises them: TP changes an int4 answer's logits, and by how much is known."""
    prompt = model.prompt("text-only")
    one, four = (all_logits(model.engine("int4", tp_size), prompt) for tp_size in (1, 4))
    expected = [model.reference("int4", tp).logits(prompt.oracle_ids) for tp in (1, 4)]
    assert np.abs(one - four).max() > 100 * LOGITS_TOLERANCE
    np.testing.assert_allclose(four - one, expected[1] - expected[0], atol=2 * LOGITS_TOLERANCE)


# --- each known mistake breaks parity -----------------------------------------------------------


def wrong_axis(weight: QuantizedWeight) -> np.ndarray:
    """One scale per input: as good a quantisation, but another one."""
    limit = 2 ** (weight.bits - 1)
    matrix = weight.dequantized()
    scale = np.abs(matrix).max(axis=0, keepdims=True) / limit
    return np.clip(np.rint(matrix / scale), -limit, limit - 1) * scale


def dropped_scales(weight: QuantizedWeight) -> QuantizedWeight:
    mean = np.full_like(weight.scales, weight.scales.mean())
    return replace(weight, scales=mean)


def shifted_scales(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, scales=np.roll(weight.scales, 1))


def swapped_halves(weight: QuantizedWeight) -> QuantizedWeight:
    values = np.left_shift(weight.values, 4) | ((weight.values >> 4) & 0x0F)
    return replace(weight, values=values)


def unsigned_halves(weight: QuantizedWeight) -> np.ndarray:
    integers = weight.integers()
    return np.where(integers < 0, integers + 16, integers) * weight.scales[:, None]


MISTAKES = {
    "wrong axis": ("int4", wrong_axis),
    "wrong axis, int8": ("int8", wrong_axis),
    "dropped scales": ("int8", dropped_scales),
    "shifted scales": ("int8", shifted_scales),
    "swapped halves": ("int4", swapped_halves),
    "unsigned halves": ("int4", unsigned_halves),
}


@pytest.mark.parametrize("matrix", ["qkv", "dense", "fc", "gate", "proj"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_quantiser_breaks_parity(model: Model, mistake: str, matrix: str) -> None:
    precision, spoil = MISTAKES[mistake]
    changed: Callable[[int, LayerWeights], LayerWeights] = lambda rank, layer: replace(  # noqa: E731
        layer, **{matrix: spoil(getattr(layer, matrix))}
    )
    prompt = model.prompt("text-only")
    expected = model.reference(precision, 1).logits(prompt.oracle_ids)
    logits = all_logits(broken(model.engine(precision, 1), changed), prompt)
    assert np.abs(logits - expected).max() > 10 * LOGITS_TOLERANCE
