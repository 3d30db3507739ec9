"""Committed configs, the contract behind them, and TensorRT-LLM's template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from build.demo_checkpoint import DEMO, demo_spec
from build.render_configs import committed_configs
from internvl_triton import tensor_contract as contract
from internvl_triton.limits import Limits
from internvl_triton.triton_config import Deployment, render_repository

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
TEMPLATE = json.loads((ROOT / "tests" / "golden" / "tensorrt_llm_template.json").read_text())


def parsed(name: str):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (REPOSITORY / name / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_committed_configs_are_the_rendered_ones() -> None:
    rendered = committed_configs()
    committed = {path.parent.name: path.read_text() for path in REPOSITORY.glob("*/config.pbtxt")}
    assert committed == rendered, "run `make render-configs`"


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("*/config.pbtxt")), ids=lambda p: p.parent.name
)
def test_configs_parse_and_hold_no_placeholder(path: Path) -> None:
    assert "${" not in path.read_text()
    assert "max_batch_size: " in path.read_text()
    assert parsed(path.parent.name).name == path.parent.name


def test_every_model_file_is_a_thin_adapter() -> None:
    files = sorted(REPOSITORY.glob("*/1/model.py"))
    assert [path.parts[-3] for path in files] == sorted(model.name for model in contract.MODELS)
    for path in files:
        assert len(path.read_text().splitlines()) <= 80, path
        assert "numpy" not in path.read_text(), path


def test_only_the_language_model_batches_and_decouples() -> None:
    for model in (*contract.MODELS, contract.ENSEMBLE):
        config = parsed(model.name)
        is_llm = model is contract.TENSORRT_LLM
        assert (config.max_batch_size > 0) == is_llm, model.name
        assert config.model_transaction_policy.decoupled == is_llm, model.name


def test_postprocessing_has_one_instance() -> None:
    (group,) = parsed("postprocessing").instance_group
    assert group.count == 1  # two reorder a stream


@pytest.mark.parametrize("batch", [1, 64])
def test_postprocessing_batches_when_it_is_asked_to(batch: int) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    spec = demo_spec(DEMO)
    deployment = Deployment(
        spec, Limits.for_model(spec), DEMO, "../..", "llm", postprocessing_batch=batch
    )
    text = render_repository(deployment)["postprocessing"]
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.HasField("dynamic_batching") == (batch > 1)
    assert config.max_batch_size == (batch if batch > 1 else 0)
    # With Triton's own dimension in front, both see the same tensors.
    front = [-1] if batch > 1 else []
    on_the_wire = {tensor.name: front + list(tensor.dims) for tensor in config.input}
    assert on_the_wire == {t.name: list(t.dims) for t in contract.POSTPROCESSING.inputs}
    outputs = {tensor.name: list(tensor.dims) for tensor in config.output}
    assert outputs == {t.name: list(t.dims) for t in contract.POSTPROCESSING.outputs}


@pytest.mark.parametrize("direction", ["inputs", "outputs"])
def test_the_llm_step_is_a_subset_of_the_template(direction: str) -> None:
    """Names, dtypes, dims and flags as in TensorRT-LLM 0.21's config.pbtxt."""
    for tensor in getattr(contract.TENSORRT_LLM, direction):
        if tensor is contract.ERROR:
            continue  # ours, on the CPU only
        expected = TEMPLATE[direction][tensor.name]
        dtype = tensor.dtype
        if tensor is contract.PROMPT_EMBEDDING_TABLE:
            assert expected["data_type"] == "${prompt_embedding_table_data_type}"
        elif tensor is contract.GENERATION_LOGITS:
            assert expected["data_type"] == "${logits_datatype}"  # float32 in our checkpoints
        else:
            assert f"TYPE_{dtype}" == expected["data_type"], tensor.name
        assert list(tensor.dims) == expected["dims"], tensor.name
        assert tensor.optional == expected.get("optional", False), tensor.name
        assert tensor.ragged == expected.get("allow_ragged_batch", False), tensor.name
        assert tensor.scalar == ("reshape" in expected), tensor.name


def test_required_inputs_of_the_template_are_sent() -> None:
    required = {name for name, entry in TEMPLATE["inputs"].items() if not entry.get("optional")}
    sent = {tensor.name for tensor in contract.PREPROCESSING.outputs}
    assert required == {"input_lengths", "request_output_len"}
    assert required <= sent


def test_the_ensemble_feeds_every_step() -> None:
    config = parsed("internvl")
    available = {tensor.name for tensor in contract.ENSEMBLE.inputs}
    for model, step in zip(contract.MODELS, config.ensemble_scheduling.step, strict=True):
        assert step.model_name == model.name
        assert set(step.input_map.values()) <= available, model.name
        unmapped = {t.name for t in model.inputs} - set(step.input_map)
        assert unmapped <= {"stop", "stop_rule"}, model.name
        available |= set(step.output_map.values())
    outputs = {entry.name for entry in config.output}
    assert outputs == set(config.ensemble_scheduling.step[-1].output_map.values())


def test_a_step_behind_the_decoupled_one_takes_inputs_only_from_it() -> None:
    last = parsed("internvl").ensemble_scheduling.step[-1]
    assert all(value.startswith("tensorrt_llm.") for value in last.input_map.values())


def test_the_client_can_read_the_limits() -> None:
    parameters = parsed("internvl").parameters
    assert int(parameters["max_tiles"].string_value) == 12
    assert int(parameters["max_seq_len"].string_value) == 32768


def test_tiles_cross_as_uint8() -> None:
    for model in ("preprocessing", "vision_encoder"):
        config = parsed(model)
        (tiles,) = [t for t in (*config.input, *config.output) if t.name == "tiles"]
        assert list(tiles.dims) == [-1, 448, 448, 3]
        assert tiles.data_type == 2  # TYPE_UINT8
