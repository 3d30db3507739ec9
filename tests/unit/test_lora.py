"""LoRA-trained checkpoints read, convert and export as merged ones do.

The names of adapters are those that peft 0.15.2 gave `get_peft_model` of a Qwen2ForCausalLM and of
a module with InternViT's names; the expected weights are W + 2 B A in float64.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from export import export_hf_llm, export_llm
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import InvalidCheckpoint
from internvl_triton.lora import Stored, merged, stored_names
from internvl_triton.model_spec import ModelSpec

# wrap_llm_lora, wrap_backbone_lora: OpenGVLab/InternVL @ 2410d1d
TARGETS = {
    "internlm2": ("attention.wqkv", "attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3))),
    "qwen2": (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    "vision": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}
RANK = 4


def wrap(checkpoint: Path, target: Path, family: str, *, towers: str, base_layer: str) -> Path:
    """The checkpoint as the training code saves it with adapters, and beside it the merged one."""
    tensors = load_file(checkpoint / "model.safetensors")
    random = np.random.default_rng(7)
    wrapped, plain = {}, {}
    for name, tensor in tensors.items():
        tower = name.split(".")[0]
        if tower not in towers.split():
            wrapped[name] = plain[name] = tensor
            continue
        moved = name.replace(f"{tower}.", f"{tower}.base_model.model.", 1)
        module, _, leaf = moved.rpartition(".")
        targets = TARGETS["vision" if tower == "vision_model" else family]
        if not module.endswith(targets) or ".layers." not in module:
            wrapped[moved], plain[name] = tensor, tensor
            continue
        wrapped[f"{module}.{base_layer}{leaf}"] = tensor
        plain[name] = tensor
        if leaf == "weight":
            out, columns = tensor.shape
            a, b = (
                (0.05 * random.standard_normal(shape)).astype(ml_dtypes.bfloat16)
                for shape in ((RANK, columns), (out, RANK))
            )
            wrapped[f"{module}.lora_A.default.weight"] = a
            wrapped[f"{module}.lora_B.default.weight"] = b
            exact = tensor.astype(np.float64) + 2 * b.astype(np.float64) @ a.astype(np.float64)
            plain[name] = exact.astype(ml_dtypes.bfloat16)
    config = json.loads((checkpoint / "config.json").read_text())
    for folder, weights, rank in ((target / "lora", wrapped, RANK), (target / "plain", plain, 0)):
        shutil.copytree(checkpoint, folder)
        save_file(weights, folder / "model.safetensors")
        ranks = {
            key: rank * (tower in towers.split())
            for tower, key in (
                ("language_model", "use_llm_lora"),
                ("vision_model", "use_backbone_lora"),
            )
        }
        (folder / "config.json").write_text(json.dumps(config | ranks))
    return target


def assert_one_rounding_apart(found: np.ndarray, expected: np.ndarray) -> None:
    """float32 sums of a few products may round to the neighbouring bfloat16, rarely."""
    assert found.dtype == expected.dtype
    ours, exact = found.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_allclose(ours, exact, rtol=2**-7, atol=1e-6)
    assert np.mean(ours != exact) < 1e-3


@pytest.fixture(scope="module", params=["language_model vision_model", "language_model"])
def towers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("base_layer", ["base_layer.", ""])
def test_a_lora_checkpoint_reads_as_the_merged_one(
    checkpoint: Path, family: str, towers: str, base_layer: str, tmp_path: Path
) -> None:
    wrap(checkpoint, tmp_path, family, towers=towers, base_layer=base_layer)
    ours, plain = Checkpoint(tmp_path / "lora"), Checkpoint(tmp_path / "plain")
    shapes = checkpoint_shapes(ModelSpec.from_checkpoint(tmp_path / "lora"))
    ours.check(shapes)
    assert set(ours.names) == set(plain.names) == set(shapes)
    changed = 0
    source = Checkpoint(checkpoint)
    for name in shapes:
        assert ours.dtype(name) == "BF16"
        assert_one_rounding_apart(ours.read(name), plain.read(name))
        changed += not np.array_equal(source.read(name), plain.read(name))
    spec = ModelSpec.from_checkpoint(checkpoint)
    adapted = len(TARGETS[family]) * spec.llm.num_layers
    if "vision_model" in towers:
        adapted += len(TARGETS["vision"]) * spec.vision.num_layers
    assert changed == adapted


def test_it_converts_as_the_merged_one(checkpoint: Path, family: str, tmp_path: Path) -> None:
    wrap(
        checkpoint, tmp_path, family, towers="language_model vision_model", base_layer="base_layer."
    )
    for kind in ("lora", "plain"):
        export_llm(tmp_path / kind, tmp_path / f"{kind}-llm", tp_size=2, progress=False)
        export_hf_llm(tmp_path / kind, tmp_path / f"{kind}-hf", progress=False)
    for folder, file in (("llm", "rank1.safetensors"), ("hf", "model.safetensors")):
        with (
            safe_open(tmp_path / f"lora-{folder}" / file, framework="np") as ours,
            safe_open(tmp_path / f"plain-{folder}" / file, framework="np") as plain,
        ):
            assert set(ours.keys()) == set(plain.keys())
            for name in plain.keys():  # noqa: SIM118 (not a dict)
                assert_one_rounding_apart(ours.get_tensor(name), plain.get_tensor(name))


def test_merging_in_blocks_is_merging_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    base, a, b = (
        random.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (2, 5), (7, 2))
    )
    expected = base.astype(np.float64) + 2 * b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_allclose(merged(base, a, b), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("internvl_triton.lora._BLOCK_BYTES", 4 * 5 * 3)  # three rows a block
    np.testing.assert_allclose(merged(base, a, b), expected, rtol=1e-5, atol=1e-6)


def test_names_of_peft() -> None:
    prefix = "language_model.base_model.model.model.layers.0.self_attn.q_proj."
    halves = [prefix + f"lora_{half}.default.weight" for half in "AB"]
    names = [
        prefix + "base_layer.weight",
        prefix + "base_layer.bias",
        *halves,
        "language_model.base_model.model.lm_head.weight",
        "vision_model.base_model.model.encoder.layers.0.ls1",
        "mlp1.1.weight",
    ]
    q_proj = "language_model.model.layers.0.self_attn.q_proj."
    assert stored_names(names) == {
        q_proj + "weight": Stored(names[0], *halves),
        q_proj + "bias": Stored(names[1]),
        "language_model.lm_head.weight": Stored(names[4]),
        "vision_model.encoder.layers.0.ls1": Stored(names[5]),
        "mlp1.1.weight": Stored("mlp1.1.weight"),
    }
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight lacks its other half"):
        stored_names(names[:3])
    with pytest.raises(ValueError, match="another kind of adapter"):
        stored_names([*names, prefix + "lora_magnitude_vector.default.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_llm_lora": 8}, r"lora_A.* has shape \(4, 256\); config.json's rank 8 .*\(8, 256\)"),
        ({"use_llm_lora": 0}, r"use_llm_lora=0, .* 10 LoRA adapters of language_model"),
        ({"use_backbone_lora": 4}, r"use_backbone_lora=4, .* 0 LoRA .*or to 0 if they are merged"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    checkpoints: dict[str, Path], changes: dict, message: str, tmp_path: Path
) -> None:
    wrap(
        checkpoints["internlm2"],
        tmp_path,
        "internlm2",
        towers="language_model",
        base_layer="base_layer.",
    )
    config = tmp_path / "lora" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InvalidCheckpoint, match=message):
        Checkpoint(tmp_path / "lora")
