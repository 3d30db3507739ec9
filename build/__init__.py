"""Portable artefacts -> engines and the model repository: `build_engines`, `make_server`; what the
repository's configs say: `deployment_of`, of a checkpoint's `default_precision`.

For comparisons: `Port`, a checkpoint in transformers, and `reference_tiles` (numpy) and
`reference_pictures` (PIL) of the model card.
For benchmarks of engines: `measured_build`, and `floors_of` what it runs on.
`unpack_package` takes files out of a Debian or Ubuntu package (or `PackageUnavailable`)."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "Floors": "build.planner.floors",
    "MeasuredBuild": "build.measured",
    "PackageUnavailable": "build.debian_package",
    "Port": "build.parity.port",
    "artifact_name": "build.model_source",
    "build_engines": "build.engines",
    "default_precision": "build.engines",
    "deployment_of": "build.repository",
    "enter_container": "build.container",
    "floors_of": "build.planner.floors",
    "make_server": "build.serve",
    "measured_build": "build.measured",
    "reference_pictures": "build.parity.model_card",
    "reference_tiles": "build.parity.model_card",
    "resolve_checkpoint": "build.model_source",
    "run_logged": "build.logged_program",
    "spec_of": "build.plan",
    "unpack_package": "build.debian_package",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import on first use: an eager import would make `python -m build.engines` run twice."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
