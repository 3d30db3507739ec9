"""The demo model: its pictures, its questions, the script that trains it, and its export."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "SAMPLES": "demo.sample_requests",
    "SampleQuestion": "demo.sample_requests",
    "evaluation_examples": "demo.evaluate",
    "internlm2_config": "demo.internlm2_layout",
    "sample_questions": "demo.sample_requests",
    "service_request": "demo.request",
    "write_internlm2_layout": "demo.internlm2_layout",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import on first use: an eager import would make `python -m demo.evaluate` run twice."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
