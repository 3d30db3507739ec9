"""config.pbtxt of every model, rendered from the tensor contract through Triton's own protobuf.

No template, no placeholder: `model_config_pb2` refuses a field that Triton does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from internvl_triton import tensor_contract as contract
from internvl_triton.gpu_deployment import GpuDeployment
from internvl_triton.grpc_poller import prefer_light_poller
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.tensor_contract import ModelContract, Tensor
from internvl_triton.vision_runtime import ONNXRUNTIME

__all__ = ["Deployment", "render_repository"]

_HEADER = (
    "# Rendered from internvl_triton/tensor_contract.py by `make render-configs`; "
    "do not edit by hand.\n"
)


@dataclass(frozen=True)
class Deployment:
    """What the configs of one model repository say.

    artifacts_dir: path from a model's own folder to its artefacts.
    llm_checkpoint: path from there to the converted language model.
    postprocessing_batch: chunks, of different requests, that the last step takes at a time. More
        than 1 costs less time for each, but Triton's batcher drops the chunks of a cancelled
        request, and with them the only sign that its caller has gone
        (`triton_adapter.StopOnCancel`).
    gpu: what the gpu profile adds; None renders the cpu profile.
    """

    spec: ModelSpec
    limits: Limits
    model: str
    artifacts_dir: str
    llm_checkpoint: str
    preprocessing_instances: int = 2  # one Python process each: as many as cores to spare
    postprocessing_batch: int = 1
    gpu: GpuDeployment | None = None

    @property
    def models(self) -> tuple[ModelContract, ...]:
        """The steps, in their order."""
        return contract.gpu_models(self.gpu.table_dtype) if self.gpu else contract.MODELS


def render_repository(deployment: Deployment) -> dict[str, str]:
    """Model name -> text of its config.pbtxt."""
    artifacts = {"artifacts_dir": deployment.artifacts_dir}
    gpu, tile_size = deployment.gpu, deployment.spec.tile_size
    preprocessing, vision_encoder, tensorrt_llm, postprocessing = deployment.models
    vision = gpu.vision_parameters() if gpu else {"runtime": ONNXRUNTIME}
    configs = [
        _python_model(
            preprocessing,
            artifacts,
            instances=deployment.preprocessing_instances,
            tile_size=tile_size,
        ),
        _python_model(vision_encoder, {**artifacts, **vision}, tile_size=tile_size),
        _tensorrtllm_model(tensorrt_llm, gpu, deployment.limits)
        if gpu
        else _cpu_llm_model(tensorrt_llm, deployment, artifacts),
        _postprocessing_model(postprocessing, artifacts, deployment.postprocessing_batch),
        _ensemble(deployment),
    ]
    return {config.name: _text(config) for config in configs}


def _postprocessing_model(model: ModelContract, parameters: dict[str, str], batch: int) -> Any:
    """One instance: two would reorder the chunks of a stream."""
    if batch == 1:
        return _python_model(model, parameters)
    config = _python_model(model.batched(), parameters, max_batch_size=batch)
    config.dynamic_batching.SetInParent()
    return config


def _cpu_llm_model(model: ModelContract, deployment: Deployment, artifacts: dict[str, str]) -> Any:
    """The language model's step as the CPU engine."""
    limits = deployment.limits
    parameters = {
        **artifacts,
        "llm_checkpoint": deployment.llm_checkpoint,
        "max_seq_len": str(limits.max_seq_len),
        "max_visual_tokens": str(limits.max_visual_tokens(deployment.spec)),
        "max_queue_size": str(limits.max_queue_size),
        "prefix_cache_bytes": str(limits.prefix_cache_bytes),
    }
    return _python_model(model, parameters, max_batch_size=limits.max_batch_size, decoupled=True)


def _tensorrtllm_model(model: ModelContract, gpu: GpuDeployment, limits: Limits) -> Any:
    """The language model's step as TensorRT-LLM's backend."""
    config = _python_model(
        model,
        gpu.llm_parameters(limits),
        max_batch_size=limits.max_batch_size,
        decoupled=True,
    )
    config.backend = "tensorrtllm"
    config.dynamic_batching.preferred_batch_size.append(limits.max_batch_size)
    # Triton's batcher and TensorRT-LLM's executor both take it from here; 0 would be no limit.
    config.dynamic_batching.default_queue_policy.max_queue_size = max(1, limits.max_queue_size)
    return config


def _messages() -> Any:
    """Triton's protobuf module of model configs."""
    prefer_light_poller()  # the package of the messages imports gRPC
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def _python_model(
    model: ModelContract,
    parameters: dict[str, str],
    *,
    instances: int = 1,
    max_batch_size: int = 0,
    decoupled: bool = False,
    tile_size: int | None = None,
) -> Any:
    pb = _messages()

    config = pb.ModelConfig(name=model.name, backend="python", max_batch_size=max_batch_size)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    _add_tensors(config, model, tile_size)
    group = config.instance_group.add(count=instances)
    group.kind = pb.ModelInstanceGroup.KIND_CPU
    _add_parameters(config, parameters)
    return config


def _ensemble(deployment: Deployment) -> Any:
    pb = _messages()

    spec, limits = deployment.spec, deployment.limits
    config = pb.ModelConfig(name=contract.ENSEMBLE.name, platform="ensemble", max_batch_size=0)
    _add_tensors(config, contract.ENSEMBLE, None)
    outer_in = {tensor.name for tensor in contract.ENSEMBLE.inputs}
    # Two tensors keep their name from step to step, so a step's output gets the step's prefix
    # wherever the ensemble's own outputs would be overwritten.
    produced: dict[str, str] = {name: name for name in outer_in}
    last = deployment.models[-1].name
    read = {tensor.name for model in deployment.models for tensor in model.inputs}
    for model in deployment.models:
        step = config.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
        for tensor in model.inputs:
            if tensor.name in produced:
                step.input_map[tensor.name] = produced[tensor.name]
        for tensor in model.outputs:
            if model.name != last and tensor.name not in read:
                continue  # Triton refuses an ensemble with a tensor that no step reads
            value = tensor.name if model.name == last else f"{model.name}.{tensor.name}"
            step.output_map[tensor.name] = value
            produced[tensor.name] = value
    _add_parameters(
        config,
        {
            "model": deployment.model,
            "max_seq_len": str(limits.max_seq_len),
            "default_max_tokens": str(limits.default_max_tokens),
            "max_batch_size": str(limits.max_batch_size),
            "max_tiles": str(spec.max_tiles),
            "max_tiles_per_request": str(limits.max_tiles_per_request),
            "tile_size": str(spec.tile_size),
            "tokens_per_tile": str(spec.tokens_per_tile),
            "use_thumbnail": str(spec.use_thumbnail).lower(),
            "max_images": str(limits.max_images),
            "max_image_bytes": str(limits.max_image_bytes),
            "max_image_pixels": str(limits.max_image_pixels),
        },
    )
    return config


def _add_tensors(config: Any, model: ModelContract, tile_size: int | None) -> None:
    pb = _messages()

    def fill(entry: Any, tensor: Tensor) -> None:
        entry.name = tensor.name
        entry.data_type = pb.DataType.Value(f"TYPE_{tensor.dtype}")
        entry.dims.extend(
            tile_size if tile_size and dim == contract.TILE_SIZE else dim for dim in tensor.dims
        )
        if tensor.scalar:
            entry.reshape.SetInParent()

    for tensor in model.inputs:
        entry = config.input.add()
        fill(entry, tensor)
        entry.optional = tensor.optional
        entry.allow_ragged_batch = tensor.ragged
    for tensor in model.outputs:
        fill(config.output.add(), tensor)


def _add_parameters(config: Any, parameters: dict[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def _text(config: Any) -> str:
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, use_index_order=True)
    if config.max_batch_size == 0:
        # The text format leaves zeros out; Triton's readers should see what was decided.
        head, line, tail = text.partition("input {")
        text = f"{head}max_batch_size: 0\n{line}{tail}"
    return _HEADER + text
