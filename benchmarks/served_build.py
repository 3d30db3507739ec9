"""Which build a running service serves, as the configs of its models say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import LLMBuild, Profile
from internvl_triton.errors import InvalidRequest, ServerUnavailable
from internvl_triton.grpc_poller import prefer_light_poller

__all__ = ["ServedBuild", "read_served_build", "served_build"]

# Profile -> its parameter of the language model's step: .../llm/<build>/{checkpoint,engine}.
_PATHS: dict[Profile, str] = {"cpu": "llm_checkpoint", "gpu": "gpt_model_path"}


@dataclass(frozen=True)
class ServedBuild:
    """max_tiles: of one picture, its thumbnail included."""

    model: str
    llm: LLMBuild
    profile: Profile
    max_batch_size: int
    max_tiles: int


def read_served_build(grpc_url: str) -> ServedBuild:
    """Of the service at host:port. Raises ServerUnavailable; InvalidRequest for another one."""
    prefer_light_poller()
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    try:
        with InferenceServerClient(grpc_url) as client:
            ensemble, llm = (
                {
                    name: parameter.string_value
                    for name, parameter in client.get_model_config(model).config.parameters.items()
                }
                for model in (contract.ENSEMBLE.name, contract.TENSORRT_LLM.name)
            )
    except InferenceServerException as error:
        raise ServerUnavailable(
            f"{grpc_url} does not describe its models ({error.status() or 'no status'}); is "
            "`make serve` ready there, and is it the gRPC port?"
        ) from error
    return served_build(ensemble, llm)


def served_build(ensemble: dict[str, str], llm: dict[str, str]) -> ServedBuild:
    """From the parameters of the ensemble and of its language model's step.

    Raises InvalidRequest when they are not those of a service of this project.
    """
    try:
        profile: Profile = "gpu" if _PATHS["gpu"] in llm else "cpu"
        return ServedBuild(
            model=ensemble["model"],
            llm=LLMBuild.from_name(PurePosixPath(llm[_PATHS[profile]]).parent.name),
            profile=profile,
            max_batch_size=int(ensemble["max_batch_size"]),
            max_tiles=_with_thumbnail(int(ensemble["max_tiles"]), ensemble["use_thumbnail"]),
        )
    except (KeyError, ValueError) as error:
        raise InvalidRequest(
            f"the service is none of this project, or of another release: its configs lack or "
            f"garble {error}"
        ) from error


def _with_thumbnail(max_tiles: int, use_thumbnail: str) -> int:
    return max_tiles + (use_thumbnail == "true" and max_tiles > 1)
