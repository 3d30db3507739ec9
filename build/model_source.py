"""MODEL, a name or a directory, to a checkpoint directory on this machine."""

from __future__ import annotations

import difflib
from pathlib import Path

from build.demo_checkpoint import DEMO, DEMO_NAMES, demo_checkpoint
from internvl_triton.errors import DownloadFailed, UnknownModel
from internvl_triton.published_models import (
    HUB_ORGANISATION,
    NOT_CONVERTED,
    OTHER_GENERATIONS,
    PUBLISHED_MODELS,
)

__all__ = ["DEMO", "artifact_name", "is_known_name", "resolve_checkpoint"]

# The -MPO checkpoints share architecture and format with the sizes they were tuned from.
NAMES = (
    *PUBLISHED_MODELS,
    *(f"{name}-MPO" for name in PUBLISHED_MODELS),
    *OTHER_GENERATIONS,
)
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def is_known_name(model: str) -> bool:
    """Whether MODEL is a name of ours; then it is no directory, even if there is one."""
    return model.removeprefix(f"{HUB_ORGANISATION}/") in (*DEMO_NAMES, *NAMES)


def artifact_name(model: str) -> str:
    """Folder below artifacts/ for MODEL: its name, or its directory's.

    A known name wins over a directory of the same name here; write ./demo for that one.
    Raises UnknownModel, with the names there are, for anything else.
    """
    name = model.removeprefix(f"{HUB_ORGANISATION}/")
    if is_known_name(model):
        return name
    if model and Path(model).is_dir():
        return Path(model).resolve().name
    _check_converted(name)
    close = difflib.get_close_matches(name, [*DEMO_NAMES, *NAMES], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UnknownModel(
        f"MODEL={model!r} is neither a directory nor a known name{hint}. "
        f"Names: {', '.join((*DEMO_NAMES, *NAMES))}. "
        "Or pass a local checkpoint directory: MODEL=path/to/checkpoint"
    )


def _check_converted(name: str) -> None:
    """Raise UnknownModel for a published name that is known not to be convertible."""
    if name.endswith("-hf"):
        raise UnknownModel(
            f"MODEL={name!r} is in transformers' own format; use OpenGVLab's original one: "
            f"MODEL={name.removesuffix('-hf')}"
        )
    if name.endswith("-AWQ"):
        raise UnknownModel(
            f"MODEL={name!r} is quantised already; use the unquantised one: "
            f"MODEL={name.removesuffix('-AWQ')} PRECISION=int4_awq"
        )
    if name in NOT_CONVERTED:
        raise UnknownModel(f"MODEL={name!r} cannot be converted: {NOT_CONVERTED[name]}")
    if name.startswith("InternVL3_5-"):
        raise UnknownModel(
            f"MODEL={name!r} cannot be converted: InternVL3.5's language models are Qwen3 and "
            "GPT-OSS; use InternVL3-8B or another InternVL3"
        )


def resolve_checkpoint(model: str, artifacts_dir: Path) -> Path:
    """The checkpoint directory of MODEL: ours (the demo), downloaded from the model hub, or local.

    Raises UnknownModel; DownloadFailed, with how to pass a local directory.
    """
    name = artifact_name(model)
    target = artifacts_dir / "checkpoints" / name
    if model in DEMO_NAMES:
        return demo_checkpoint(model, target)
    if model.removeprefix(f"{HUB_ORGANISATION}/") in NAMES:
        return _download(name, target)
    return Path(model).resolve()


def _download(name: str, target: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository = f"{HUB_ORGANISATION}/{name}"
    print(f"{repository}: checking the model hub ...", flush=True)
    try:
        snapshot_download(repository, local_dir=target, allow_patterns=list(_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DownloadFailed(
            f"{repository} could not be downloaded from the model hub: {reason[0]}\n"
            "Without a network, copy the checkpoint here and pass its directory: "
            f"make engines MODEL=path/to/{name}"
        ) from error
    return target
