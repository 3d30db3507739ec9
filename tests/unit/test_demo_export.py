"""The exported checkpoint is the trained model: in transformers, and in both layouts."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

from demo.batch import collate  # noqa: E402
from demo.dialogue import make_example  # noqa: E402
from demo.drawing import draw_scene  # noqa: E402
from demo.encoding import IGNORE, Encoded, encode_example  # noqa: E402
from demo.evaluate import read_weights  # noqa: E402
from demo.export import read_average, write_qwen2_layout  # noqa: E402
from demo.internlm2_layout import write_internlm2_layout  # noqa: E402
from demo.loss import embed  # noqa: E402
from demo.model import (  # noqa: E402
    Weights,
    demo_config,
    hidden_states,
    start_weights,
    visual_features,
)
from demo.vocabulary import demo_vocabulary  # noqa: E402
from internvl_triton.checkpoint import Checkpoint  # noqa: E402
from internvl_triton.checkpoint_layout import checkpoint_shapes  # noqa: E402
from internvl_triton.errors import IncompleteCheckpoint, UnsupportedCheckpoint  # noqa: E402
from internvl_triton.model_spec import ModelSpec  # noqa: E402
from internvl_triton.safetensors_file import SafetensorsWriter  # noqa: E402
from internvl_triton.tokenizer import load_tokenizer  # noqa: E402
from tests.oracle import Oracle  # noqa: E402
from tests.reference import reference_ids, reference_prompt, reference_tiles  # noqa: E402

QUESTION = "Describe the image."
MAX_BYTES = 15e6


@dataclass(frozen=True)
class Exported:
    weights: Weights
    spec: ModelSpec
    qwen2: Path
    internlm2: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Weights whose attention and head are loud enough to tell inputs apart, in both layouts."""
    root = tmp_path_factory.mktemp("demo")
    spec = ModelSpec.from_config(demo_config(len(demo_vocabulary().qwen2_tokens)))
    weights = start_weights(spec, seed=3)
    for name, tensor in weights.items():
        if tensor.ndim == 2 and "embed" not in name:
            tensor *= 3
    qwen2 = write_qwen2_layout(weights, root / "qwen2")
    internlm2 = write_internlm2_layout(qwen2, root / "internlm2")
    return Exported(read_weights(qwen2), spec, qwen2, internlm2)


def row(exported: Exported, *, bos: bool) -> tuple[Encoded, np.ndarray]:
    """One question about one picture, ending where the answer begins."""
    tokenizer = load_tokenizer(exported.qwen2)
    example = make_example(random.Random(1), "one_tile", tile_size=448)
    first = next(b for b in example.branches if b[0].kind == "describe")
    example = type(example)(example.scenes, example.media, (first[:1],))
    encoded = encode_example(example, tokenizer=tokenizer, spec=exported.spec, bos=bos)
    return encoded, reference_tiles(draw_scene(example.scenes[0]))


def logits(exported: Exported, encoded: Encoded) -> np.ndarray:
    """float32 (n, vocab): the training model's logits of the whole row."""
    with torch.no_grad():
        batch = collate([encoded], vocab_size=exported.spec.llm.vocab_size)
        features = visual_features(exported.weights, batch.tiles, exported.spec)
        embeddings = embed(exported.weights, batch.ids, features)
        hidden = hidden_states(
            exported.weights, embeddings, batch.positions, batch.mask, exported.spec.llm
        )
        return (hidden[0] @ exported.weights["language_model.lm_head.weight"].T).numpy()


def oracle_ids(checkpoint: Path, encoded: Encoded, question: str) -> list[int]:
    """The same row for transformers, from the reference's own prompt."""
    prompt = reference_prompt([], f"<image>\n{question}", [len(encoded.tiles)])
    return reference_ids(checkpoint, prompt + encoded.answers[0].text + "<|im_end|>")


@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_transformers_says_what_the_training_model_says(exported: Exported, family: str) -> None:
    internlm2 = family == "internlm2"
    checkpoint = exported.internlm2 if internlm2 else exported.qwen2
    encoded, tiles = row(exported, bos=internlm2)
    oracle = Oracle(checkpoint)  # loads strictly
    ids = oracle_ids(checkpoint, encoded, encoded.answers[0].question)
    given = oracle.logits(ids, tiles)
    ours = logits(exported, encoded)
    if internlm2:
        table = demo_vocabulary().qwen2_id
        shared = [index for index, other in enumerate(table) if other is not None]
        given, ours = given[:, shared], ours[:, [table[index] for index in shared]]
    assert given.shape == ours.shape
    assert np.abs(given - ours).max() < 1e-3 * np.abs(ours).max()
    text = encoded.labels != IGNORE
    assert (given[text].argmax(-1) == ours[text].argmax(-1)).all()


def test_the_qwen2_layout_is_complete_and_small(exported: Exported) -> None:
    checkpoint = Checkpoint(exported.qwen2)
    spec = ModelSpec.from_checkpoint(exported.qwen2)
    shapes = checkpoint_shapes(spec)
    checkpoint.check(shapes)
    assert sorted(checkpoint.names) == sorted(shapes)
    assert {checkpoint.dtype(name) for name in shapes} == {"BF16"}
    assert sum(file.stat().st_size for file in exported.qwen2.iterdir()) < MAX_BYTES
    assert spec.tokens_per_tile == 256
    assert spec.max_tiles_with_thumbnail == 13
    biases = [name for name in shapes if name.endswith("_proj.bias")]
    assert len(biases) == 12
    assert not any(checkpoint.read(name).astype(np.float32).any() for name in biases)


def test_the_internlm2_layout_is_complete(exported: Exported) -> None:
    checkpoint = Checkpoint(exported.internlm2)
    spec = ModelSpec.from_checkpoint(exported.internlm2)
    checkpoint.check(checkpoint_shapes(spec))
    assert spec.llm.family == "internlm2"
    assert load_tokenizer(exported.internlm2).bos_id == 1
    assert len(load_tokenizer(exported.internlm2)) == spec.llm.vocab_size
    embeddings = checkpoint.read("language_model.model.tok_embeddings.weight")
    assert not embeddings[1].astype(np.float32).any()


def test_biases_cannot_take_the_internlm2_layout(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "biased"
    source.mkdir()
    for file in exported.qwen2.iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint(exported.qwen2)
    shapes = {name: ("BF16", checkpoint.read(name).shape) for name in checkpoint.names}
    biased = "language_model.model.layers.0.self_attn.q_proj.bias"
    with SafetensorsWriter(source / "model.safetensors", shapes) as writer:
        for name in shapes:
            writer.write(name, checkpoint.read(name) + (name == biased))
    with pytest.raises(UnsupportedCheckpoint, match=biased):
        write_internlm2_layout(source, tmp_path / "internlm2")


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpoint, match=r"demo\.train"):
        read_average(tmp_path)


def test_configs_differ_only_in_the_language_model(exported: Exported) -> None:
    one, other = (
        json.loads((path / "config.json").read_text())
        for path in (exported.qwen2, exported.internlm2)
    )
    llm, other_llm = one.pop("llm_config"), other.pop("llm_config")
    assert one == other
    assert {key for key in llm | other_llm if llm.get(key) != other_llm.get(key)} == {
        "architectures",
        "bias",
        "model_type",
        "rope_scaling",
        "use_sliding_window",
        "vocab_size",
    }
