"""What TensorRT calls back during a build: a log that keeps errors, a monitor that shows progress.

Their base classes live in the TensorRT module, so they are made when it is known.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ["new_log", "new_progress_monitor"]


def new_log(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps errors for the exception and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def summary(self) -> str:
            return " | ".join(self.errors[-3:]) or "TensorRT gave no reason"

    return Log()


def new_progress_monitor(trt: ModuleType) -> Any:
    """TensorRT's outermost phases as progress bars."""
    from tqdm import tqdm

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, Any] = {}

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self.bars[phase] = tqdm(total=num_steps, desc=phase, unit="step")

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.bars:
                self.bars[phase].update()
            return True  # go on building

        def phase_finish(self, phase: str) -> None:
            if phase in self.bars:
                self.bars.pop(phase).close()

    return Monitor()
