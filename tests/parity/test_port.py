"""The reference of `make verify`: streamed or not, its own weights or others."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from build.parity.stored_weights import stored_weights
from internvl_triton.errors import BuildFailed, InvalidCheckpoint
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from tests.oracle import Oracle, torch
from tests.unit.test_lora import wrap

FAMILIES = [("qwen2", "300m"), ("internlm2", "6b")]


@pytest.mark.parametrize(("family", "vit"), FAMILIES)
def test_streaming_changes_no_bit_and_keeps_nothing(family: str, vit: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config(family, vit), shards=3)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 448, 448, 3), np.uint8)
    whole, streamed = Oracle(checkpoint), Oracle(checkpoint, streamed=True)
    prompt = [5, 6, *[whole.image_token_id] * 512, 7]
    positions = [0, 300, 514, 516]
    expected = whole.forward(prompt, [8, 9], tiles, positions)
    found = streamed.forward(prompt, [8, 9], tiles, positions)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.features, expected.features)
    assert {parameter.device.type for parameter in streamed.model.parameters()} == {"meta"}
    # and the port's own way of putting features into a prompt gives the same
    own = whole.logits([*prompt, 8, 9], tiles)[positions]
    np.testing.assert_allclose(found.logits, own, atol=1e-4)


def test_an_image_token_in_the_answer_is_a_token(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config("qwen2", "300m"))
    port = Oracle(checkpoint)
    none = np.empty((0, 448, 448, 3), np.uint8)
    image = port.image_token_id
    found = port.forward([5, 6], [image, 7], none, range(4)).logits
    embedded = port.model.get_input_embeddings()(torch.tensor([[5, 6, image, 7]]))
    with torch.no_grad():
        expected = port.model(inputs_embeds=embedded).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("family", "vit"), FAMILIES)
@pytest.mark.parametrize("base_layer", ["base_layer.", ""])
def test_lora_is_merged(family: str, vit: str, base_layer: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config(family, vit))
    towers = "language_model vision_model"
    folder = wrap(checkpoint, tmp_path / "w", family, towers=towers, base_layer=base_layer)
    tiles = np.random.default_rng(0).integers(0, 256, (1, 448, 448, 3), np.uint8)
    found, expected, untrained = (
        port.forward([5, *[port.image_token_id] * 256, 7], [8], tiles, [257, 258])
        for port in (Oracle(folder / "lora"), Oracle(folder / "plain"), Oracle(checkpoint))
    )
    np.testing.assert_allclose(found.features, expected.features, atol=1e-3)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-2)
    assert np.abs(untrained.logits - expected.logits).max() > 0.1


def test_other_tensors_than_the_ports_are_refused(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "c", tiny_config("qwen2", "300m"))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"differ in 1 tensors, such as lm_head\.weight"):
        Oracle(checkpoint, streamed=True)


def test_quantised_rows_by_hand() -> None:
    """bits 4: scale = max|row| / 8; 0.35 / 0.1 = 3.5 rounds away from zero; 0.8 / 0.1 = 8 is cut
    to 7. A row of zeros stays one. With 2 ranks the two halves have scales of their own."""
    weights = stored_weights("int4", stored="fp32", tp_size=2)
    name = "language_model.model.layers.0.mlp.gate_proj.weight"
    rows = torch.tensor([[0.8, 0.35, -0.35, -0.8], [0.0, 0.0, 0.0, 0.0]])
    expected = [[0.7, 0.4, -0.4, -0.8], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(weights(name, rows), expected, atol=1e-6)
    halves = weights(name.replace("gate", "down"), rows[:1])  # scales 0.1 and 0.1
    np.testing.assert_allclose(halves, expected[:1], atol=1e-6)
    other = weights(name.replace("gate", "down"), torch.tensor([[0.8, 0.35, 0.07, -0.04]]))
    np.testing.assert_allclose(other, [[0.7, 0.4, 0.06125, -0.04375]], atol=1e-6)
    # 0.07 / 0.00875 = 8 -> 7, and -0.04 / 0.00875 = -4.57 -> -5


def test_only_the_language_models_matrices_are_changed() -> None:
    tensor = torch.tensor([[1.001, 0.3]])
    for name in ("vision_model.x.weight", "mlp1.1.weight"):
        assert torch.equal(stored_weights("int4", stored="bf16", tp_size=1)(name, tensor), tensor)
    head = stored_weights("int8", stored="bf16", tp_size=1)("language_model.lm_head.weight", tensor)
    assert torch.equal(head, tensor.bfloat16().float())
    with pytest.raises(BuildFailed, match=r"'fp8' cannot be verified.*bf16, fp16, fp32, int8"):
        stored_weights("fp8", stored="bf16", tp_size=1)
