"""config.pbtxt of every model, rendered from the tensor contract through Triton's own protobuf.

No template, no placeholder: `model_config_pb2` refuses a field that Triton does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from internvl_triton import tensor_contract as contract
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.tensor_contract import ModelContract, Tensor

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
    """

    spec: ModelSpec
    limits: Limits
    model: str
    artifacts_dir: str
    llm_checkpoint: str
    preprocessing_instances: int = 2  # one Python process each: as many as cores to spare


def render_repository(deployment: Deployment) -> dict[str, str]:
    """Model name -> text of its config.pbtxt, for the CPU profile."""
    artifacts = {"artifacts_dir": deployment.artifacts_dir}
    limits = deployment.limits
    llm_parameters = {
        **artifacts,
        "llm_checkpoint": deployment.llm_checkpoint,
        "max_seq_len": str(limits.max_seq_len),
        "max_visual_tokens": str(limits.max_visual_tokens(deployment.spec)),
        "max_queue_size": str(limits.max_queue_size),
    }
    configs = [
        _python_model(
            contract.PREPROCESSING,
            artifacts,
            instances=deployment.preprocessing_instances,
            tile_size=deployment.spec.tile_size,
        ),
        _python_model(contract.VISION_ENCODER, artifacts, tile_size=deployment.spec.tile_size),
        _python_model(
            contract.TENSORRT_LLM,
            llm_parameters,
            max_batch_size=limits.max_batch_size,
            decoupled=True,
        ),
        # One instance: two would reorder the chunks of a stream.
        _python_model(contract.POSTPROCESSING, artifacts),
        _ensemble(deployment),
    ]
    return {config.name: _text(config) for config in configs}


def _python_model(
    model: ModelContract,
    parameters: dict[str, str],
    *,
    instances: int = 1,
    max_batch_size: int = 0,
    decoupled: bool = False,
    tile_size: int | None = None,
) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(name=model.name, backend="python", max_batch_size=max_batch_size)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    _add_tensors(config, model, tile_size)
    group = config.instance_group.add(count=instances)
    group.kind = pb.ModelInstanceGroup.KIND_CPU
    _add_parameters(config, parameters)
    return config


def _ensemble(deployment: Deployment) -> Any:
    from tritonclient.grpc import model_config_pb2 as pb

    spec, limits = deployment.spec, deployment.limits
    config = pb.ModelConfig(name=contract.ENSEMBLE.name, platform="ensemble", max_batch_size=0)
    _add_tensors(config, contract.ENSEMBLE, None)
    outer_in = {tensor.name for tensor in contract.ENSEMBLE.inputs}
    # Two tensors keep their name from step to step, so a step's output gets the step's prefix
    # wherever the ensemble's own outputs would be overwritten.
    produced: dict[str, str] = {name: name for name in outer_in}
    last = contract.MODELS[-1].name
    for model in contract.MODELS:
        step = config.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
        for tensor in model.inputs:
            if tensor.name in produced:
                step.input_map[tensor.name] = produced[tensor.name]
        for tensor in model.outputs:
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
    from tritonclient.grpc import model_config_pb2 as pb

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
