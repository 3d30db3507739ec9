"""Configs of the gpu profile, for every published size, against TensorRT-LLM 0.21's template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from build.repository import assemble_repository
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild, Manifest
from internvl_triton.gpu_deployment import GpuDeployment
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config
from internvl_triton.triton_config import Deployment, render_repository

ROOT = Path(__file__).parents[2]
TEMPLATE = json.loads((ROOT / "tests" / "golden" / "tensorrt_llm_template.json").read_text())
MIB = 2**20
# Without a default in triton_backend/inflight_batcher_llm/src/model_instance_state.cc @ 0c8de69a.
REQUIRED = {
    *("gpt_model_type", "gpt_model_path"),
    *("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"),
}


def deployment(name: str, *, dtype: str = "bfloat16", num_gpus: int = 1, **limits: int):
    spec = ModelSpec.from_config(published_config(name))
    return Deployment(
        spec=spec,
        limits=Limits.for_model(spec, **limits),
        model=name,
        artifacts_dir="../..",
        llm_checkpoint="llm/bf16-tp1/checkpoint",
        gpu=GpuDeployment(Path("/artifacts/x/llm/engine"), dtype, num_gpus),
    )


def parse(text: str) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    assert "${" not in text
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def configs(rendered: Deployment) -> dict[str, Any]:
    return {name: parse(text) for name, text in render_repository(rendered).items()}


def parameters(config: Any) -> dict[str, str]:
    return {key: item.string_value for key, item in config.parameters.items()}


def type_name(entry: Any) -> str:
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.DataType.Name(entry.data_type)


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
@pytest.mark.parametrize(("dtype", "table"), [("bfloat16", "TYPE_BF16"), ("float16", "TYPE_FP16")])
def test_the_llm_step_of_every_size_is_the_templates(name: str, dtype: str, table: str) -> None:
    spec = ModelSpec.from_config(published_config(name))
    for num_gpus in spec.llm.valid_tp_sizes:
        step = configs(deployment(name, dtype=dtype, num_gpus=num_gpus))["tensorrt_llm"]
        assert (step.backend, step.platform, step.max_batch_size) == ("tensorrtllm", "", 8)
        assert step.model_transaction_policy.decoupled
        assert set(parameters(step)) <= set(TEMPLATE["parameters"])
        assert set(parameters(step)) >= REQUIRED
        for direction, entries in (("inputs", step.input), ("outputs", step.output)):
            for entry in entries:
                expected = TEMPLATE[direction][entry.name]
                template_type = expected["data_type"]
                if entry.name == "prompt_embedding_table":
                    assert template_type == "${prompt_embedding_table_data_type}"
                    template_type = table
                if entry.name == "generation_logits":
                    assert template_type == "${logits_datatype}"
                    template_type = "TYPE_FP32"  # logits_dtype of our checkpoints
                assert type_name(entry) == template_type, entry.name
                assert list(entry.dims) == expected["dims"], entry.name
                assert entry.HasField("reshape") == ("reshape" in expected), entry.name
                assert list(entry.reshape.shape) == expected.get("reshape", []), entry.name
        for entry in step.input:
            expected = TEMPLATE["inputs"][entry.name]
            assert entry.optional == expected.get("optional", False), entry.name
            assert entry.allow_ragged_batch == expected.get("allow_ragged_batch", False)


def test_the_llm_step_says_what_we_rely_on() -> None:
    step = configs(deployment("InternVL2_5-8B"))["tensorrt_llm"]
    (group,) = step.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert list(step.dynamic_batching.preferred_batch_size) == [8]
    assert step.dynamic_batching.default_queue_policy.max_queue_size == 64
    said = parameters(step)
    assert said["gpt_model_type"] == "inflight_fused_batching"
    assert said["gpt_model_path"] == "/artifacts/x/llm/engine"
    assert said["FORCE_CPU_ONLY_INPUT_TENSORS"] == "no"
    assert said["batch_scheduler_policy"] == "guaranteed_no_evict"
    assert said["enable_kv_cache_reuse"] == said["exclude_input_in_output"] == "true"
    assert said["max_tokens_in_paged_kv_cache"] == "65536"
    assert "kv_cache_free_gpu_mem_fraction" not in said  # no share of whatever is free


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({}, 65536),  # 8 x 32768, capped
        ({"max_batch_size": 4, "max_seq_len": 4096}, 16384),  # 4 x 4096
        ({"max_kv_cache_tokens": 200_000}, 200_000),
        ({"max_kv_cache_tokens": 1000}, 32768),  # one request always fits
    ],
)
def test_the_kv_cache_is_sized_by_the_limits(limits: dict[str, int], tokens: int) -> None:
    rendered = deployment("InternVL2_5-26B", **limits)
    assert rendered.limits.kv_cache_tokens == tokens
    said = parameters(configs(rendered)["tensorrt_llm"])
    assert said["max_tokens_in_paged_kv_cache"] == str(tokens)


def test_only_the_two_engines_differ_from_the_cpu_profile() -> None:
    on_gpu = deployment("InternVL2_5-8B", num_gpus=2)
    on_cpu = Deployment(**{**vars(on_gpu), "gpu": None})
    gpu, cpu = render_repository(on_gpu), render_repository(on_cpu)
    assert gpu.keys() == cpu.keys()
    assert {name for name in gpu if gpu[name] == cpu[name]} == {"preprocessing", "postprocessing"}
    vision = parse(gpu["vision_encoder"])
    assert parameters(vision) == {
        "artifacts_dir": "../..",
        "runtime": "tensorrt",
        "num_gpus": "2",
        "table_dtype": "BF16",
    }
    assert parameters(parse(cpu["vision_encoder"]))["runtime"] == "onnxruntime"
    assert type_name(vision.output[0]) == "TYPE_BF16"
    # The ensemble differs in the one tensor that TensorRT-LLM does not have.
    differing = set(gpu["internvl"].splitlines()) ^ set(cpu["internvl"].splitlines())
    assert differing == {'      value: "tensorrt_llm.error"'}


def test_the_ensemble_maps_no_error_tensor_of_the_llm_step() -> None:
    rendered = configs(deployment("InternVL2_5-8B"))
    outputs = {entry.name for entry in rendered["tensorrt_llm"].output}
    assert "error" not in outputs
    ensemble = rendered["internvl"]
    *_, llm, last = ensemble.ensemble_scheduling.step
    assert set(llm.output_map) == outputs - {"num_output_tokens"}  # no step reads it
    assert "error" not in last.input_map
    assert "error" in {entry.name for entry in ensemble.output}  # always "" on the GPU
    available = {entry.name for entry in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        assert set(step.input_map.values()) <= available
        required = {e.name for e in rendered[step.model_name].input if not e.optional}
        assert required <= set(step.input_map), step.model_name
        assert set(step.output_map) <= {e.name for e in rendered[step.model_name].output}
        available |= set(step.output_map.values())


@pytest.mark.parametrize(
    ("name", "pool_mib"),
    [
        ("InternVL2_5-1B", 112),  # 4 tables x 64 tiles x 256 rows x 896 x 2 bytes
        ("InternVL2_5-78B", 1024),  # 4 x 64 x 256 x 8192 x 2
    ],
)
def test_the_memory_pool_holds_four_of_the_largest_tables(name: str, pool_mib: int) -> None:
    rendered = deployment(name)
    assert rendered.gpu is not None
    pool = rendered.gpu.cuda_memory_pool_bytes(rendered.spec, rendered.limits)
    assert pool == pool_mib * MIB
    small = Limits.for_model(rendered.spec, max_tiles_per_request=13)
    assert rendered.gpu.cuda_memory_pool_bytes(rendered.spec, small) >= 64 * MIB


def test_the_repository_on_disk(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / "tiny")
    shutil.copytree(checkpoints["qwen2"], artifacts.tokenizer_dir)
    limits = Limits.for_model(artifacts.spec()).to_json()
    artifacts.write_manifest(Manifest(model="tiny", limits=limits))
    llm = LLMBuild("bf16", 2)
    artifacts.llm_checkpoint(llm).mkdir(parents=True)
    (artifacts.llm_checkpoint(llm) / "config.json").write_text('{"dtype": "bfloat16"}')
    repository = assemble_repository(artifacts, llm, profile="gpu")
    with_code = {path.parts[-3] for path in repository.glob("*/1/model.py")}
    assert with_code == {"preprocessing", "vision_encoder", "postprocessing"}
    for model in (*contract.MODELS, contract.ENSEMBLE):
        assert (repository / model.name / "1").is_dir()  # a version of each, also without code
    text = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    # The backend does not resolve a path against the repository.
    assert parameters(parse(text))["gpt_model_path"] == str(artifacts.llm_engine(llm).resolve())
    assert parameters(parse(text))["guided_decoding_backend"] == "xgrammar"
    info = json.loads(Path(parameters(parse(text))["xgrammar_tokenizer_info_path"]).read_text())
    assert len(info["encoded_vocab"]) == artifacts.spec().llm.vocab_size
