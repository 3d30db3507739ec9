"""Checkpoint -> portable artefacts: `export_llm`, `export_vision`, `export_hf_llm`."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "CALIBRATED": "export.precision",
    "DTYPES": "export.precision",
    "PRECISIONS": "export.precision",
    "QUANT_ALGOS": "export.precision",
    "check_precision": "export.precision",
    "checkpoint_config": "export.llm_checkpoint",
    "export_hf_llm": "export.hf_llm",
    "export_llm": "export.llm_checkpoint",
    "export_vision": "export.vision_onnx",
    "stored_precision": "export.precision",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import on first use: an eager import would make `python -m export.vision_onnx` run twice."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
