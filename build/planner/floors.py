"""What a measurement is put beside: times that no engine on these GPUs can beat."""

from __future__ import annotations

from dataclasses import dataclass

from build.machine import visible_gpus
from build.planner.calibration import PEAK
from build.planner.gpus import GPUS, GpuModel, gpu_of_device, named_gpu
from build.planner.llm_time import LLMTime
from build.planner.max_load import max_load
from build.planner.precisions import Precision, checked_kv_cache, checked_precision
from build.planner.vision_time import vision_s
from internvl_triton.artifacts import LLMBuild, Profile
from internvl_triton.model_spec import ModelSpec

__all__ = ["Floors", "floors_of"]


@dataclass(frozen=True)
class Floors:
    """One build on tp_size GPUs of one kind that reach every peak of their data sheet.

    Preprocessing, the network, launches and waiting for other requests are not in them.
    """

    spec: ModelSpec
    gpu: GpuModel
    tp_size: int
    precision: Precision
    kv_cache: str

    @classmethod
    def checked(cls, spec: ModelSpec, llm: LLMBuild, gpu: GpuModel) -> Floors:
        """Raises BuildFailed when this GPU has no such precision or KV cache."""
        return cls(
            spec,
            gpu,
            llm.tp_size,
            checked_precision(llm.precision, gpu),
            checked_kv_cache(llm.kv_cache or "auto", gpu),
        )

    def vision_s(self, num_tiles: int, *, num_gpus: int = 1) -> float:
        """Seconds until the GPU with the most tiles is done; 0 without tiles."""
        share = -(-num_tiles // num_gpus)
        return vision_s(self.spec, share, gpu=self.gpu, calibration=PEAK) if share else 0.0

    def prefill_s(self, prompt_tokens: int) -> float:
        """Seconds of one prompt, visual tokens included."""
        return self._llm.prefill(prompt_tokens).total_s

    def step_s(self, batch_size: int, context_tokens: float) -> float:
        """Seconds of one decoding step of batch_size sequences with context_tokens each."""
        return self._llm.step(batch_size, context_tokens).total_s

    def output_tokens_per_s(
        self, *, batch_size: int, num_tiles: int, prompt_tokens: int, output_tokens: int
    ) -> float:
        """At most this many, of batch_size requests at a time, each with num_tiles tiles."""
        share = num_tiles * batch_size / self.tp_size
        vision = vision_s(self.spec, share, gpu=self.gpu, calibration=PEAK) if share else 0.0
        load = max_load(
            self._llm,
            batch_size=batch_size,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            vision_s_per_request=vision / batch_size,
        )
        return load.output_tokens_per_s

    @property
    def _llm(self) -> LLMTime:
        return LLMTime(
            self.spec.llm,
            gpu=self.gpu,
            tp_size=self.tp_size,
            precision=self.precision,
            kv_cache=self.kv_cache,
            calibration=PEAK,
        )


def floors_of(
    spec: ModelSpec, llm: LLMBuild, *, profile: Profile, gpu: str | None = None
) -> tuple[Floors | None, str]:
    """The floors, or None, and one sentence for the report: which, or why there are none.

    gpu: one of `GPUS`; None takes the first one that nvidia-smi lists here.
    Raises BuildFailed for another name, or when that GPU cannot do the build's precision.
    """
    if profile == "cpu":
        return None, "No floors: the engines run on a CPU, of which no data sheet gives the peaks."
    if gpu is not None:
        known = named_gpu(gpu)
    else:
        devices = visible_gpus()
        if not devices:
            return (
                None,
                f"No floors: nvidia-smi lists no GPU here; name it: --gpu {' | '.join(GPUS)}",
            )
        found = gpu_of_device(devices[0].name)
        if found is None:
            return None, (
                f"No floors: the planner does not know {devices[0].name}; if it is as fast as one "
                f"of these, name that: --gpu {' | '.join(GPUS)}"
            )
        known = found
    return Floors.checked(spec, llm, known), f"Floors: {known.name}, from its {known.source}."
