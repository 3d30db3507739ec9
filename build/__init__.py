"""Portable artefacts -> engines and the model repository: `build_engines`, `make_server`."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "build_engines": "build.engines",
    "make_server": "build.serve",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import on first use: an eager import would make `python -m build.engines` run twice."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
