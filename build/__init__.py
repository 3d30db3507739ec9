"""Portable artefacts -> engines and the model repository: `build_engines`, `make_server`.

For comparisons: `Port`, a checkpoint in transformers, and `reference_tiles` of the model card."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "Port": "build.parity.port",
    "build_engines": "build.engines",
    "make_server": "build.serve",
    "reference_tiles": "build.parity.model_card",
    "resolve_checkpoint": "build.model_source",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import on first use: an eager import would make `python -m build.engines` run twice."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
