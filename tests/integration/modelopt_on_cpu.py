"""`python modelopt_on_cpu.py OPTIONS`: `build.calibration.quantize` where torch is newer than
ModelOpt 0.31 expects: it imports parts of `torch.onnx` that torch 2.9 and later do not have.
Calibration uses none of them, so empty modules stand in."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


class Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (a module's, not a class's)
    in_onnx_export = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name)


class MissingPartsOfTorchOnnx(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith("torch.onnx."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "torch.onnx._globals":
            module.GLOBALS = types.SimpleNamespace(in_onnx_export=False)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.meta_path.append(MissingPartsOfTorchOnnx())
    exporter = "modelopt.torch.quantization.export_onnx"
    sys.modules[exporter] = Empty(exporter)
    from build.calibration.quantize import main

    sys.exit(main())
