"""How busy the GPUs are while something runs, as nvidia-smi samples it; nothing without one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from types import TracebackType
from typing import IO

__all__ = ["GpuUse"]

_QUERY = "--query-gpu=index,utilization.gpu,memory.used,power.draw"


class GpuUse:
    """`with GpuUse() as use: ...`, then `use.mean()`."""

    def __init__(self, period_ms: int = 500) -> None:
        self._period_ms = period_ms
        self._process: subprocess.Popen[str] | None = None
        self._samples: IO[str] | None = None
        self._text = ""

    def __enter__(self) -> GpuUse:
        if program := shutil.which("nvidia-smi"):
            self._samples = tempfile.TemporaryFile("w+")
            command = [program, _QUERY, "--format=csv,noheader,nounits", f"-lms={self._period_ms}"]
            self._process = subprocess.Popen(command, stdout=self._samples, text=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process and self._samples:
            self._process.terminate()
            self._process.wait()
            self._samples.seek(0)
            self._text = self._samples.read()
            self._samples.close()

    def mean(self) -> dict[str, dict[str, float]]:
        """GPU index -> mean of utilisation_percent, memory_mib and power_w."""
        return mean_of_samples(self._text)


def mean_of_samples(text: str) -> dict[str, dict[str, float]]:
    """Of lines `index, utilisation, memory, power`; "[N/A]" is left out."""
    seen: dict[str, dict[str, list[float]]] = {}
    for line in text.splitlines():
        index, *cells = (cell.strip() for cell in line.split(","))
        names = ("utilisation_percent", "memory_mib", "power_w")
        for name, cell in zip(names, cells, strict=False):
            if re.fullmatch(r"[0-9.]+", cell):
                seen.setdefault(index, {}).setdefault(name, []).append(float(cell))
    return {
        index: {name: sum(values) / len(values) for name, values in columns.items()}
        for index, columns in seen.items()
    }
