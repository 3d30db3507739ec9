"""The steps of `make engines` that make a calibrated checkpoint of the language model."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from build.calibration.inputs import write_inputs
from build.calibration.quantize import quantize
from build.calibration.samples import calibration_files
from build.fingerprint import key_of, source_digest
from build.logged_program import run_logged
from build.step import Step
from internvl_triton.artifacts import Artifacts, LLMBuild, Manifest

__all__ = ["SOURCE_STEP", "calibration_steps", "make_calibrated_checkpoint"]

SOURCE_STEP = "language model for ModelOpt"
MAX_SAMPLES = 512
MAX_SAMPLES_AWQ = 32  # its search runs every layer 11 times: `quantize_by_modelopt.py`
_FOLDER = Path(__file__).resolve().parent


def calibration_steps(
    artifacts: Artifacts,
    manifest: Manifest,
    llm: LLMBuild,
    checkpoint: Path,
    code: str,
    samples: Path | None,
    progress: bool,
) -> list[Step]:
    """The standalone language model, and the checkpoint that is calibrated with it.

    code: digest of the code that made the portable artefacts.
    samples: the user's pictures and prompts, None for the built-in ones.
    """
    from export import export_hf_llm

    source = artifacts.root / "llm" / "for_modelopt"
    made_from = manifest.checkpoint_sha256
    seen = (manifest.limits["max_seq_len"], manifest.limits["max_tiles_per_request"])
    calibrated_with = source_digest(calibration_files(samples)) if samples else "built-in"
    return [
        Step(
            SOURCE_STEP,
            key_of(made_from, code),
            source / "config.json",
            lambda: export_hf_llm(checkpoint, source, as_llama=True, progress=progress),
        ),
        Step(
            llm.step,
            key_of(
                *(made_from, code, llm, seen, calibrated_with),
                source_digest(_FOLDER.glob("*.py")),
            ),
            artifacts.llm_checkpoint(llm) / "config.json",
            lambda: make_calibrated_checkpoint(artifacts, llm, source, samples),
            {"calibrated with": "built-in samples" if samples is None else samples.name},
        ),
    ]


def make_calibrated_checkpoint(
    artifacts: Artifacts, llm: LLMBuild, source: Path, samples: Path | None
) -> None:
    """Write the checkpoint of `llm`. The vision engine is built.

    Two programs, one after the other, so that the GPUs are free again after each; what they say is
    printed and kept in `calibration_inputs.log` and `calibration.log` beside the checkpoint.
    Raises EngineBuildFailed with the end of the log.
    """
    checkpoint = artifacts.llm_checkpoint(llm)
    inputs = checkpoint.with_name("calibration_inputs")
    inputs.parent.mkdir(parents=True, exist_ok=True)
    awq = llm.precision == "int4_awq"
    try:
        run_logged(
            "reading the calibration set",
            [
                *_module(write_inputs),
                f"--artifacts={artifacts.root}",
                f"--output={inputs}",
                f"--limit={MAX_SAMPLES_AWQ if awq else MAX_SAMPLES}",
                *([f"--samples={samples}"] if samples else []),
            ],
            checkpoint.with_name("calibration_inputs.log"),
        )
        run_logged(
            "calibration",
            [
                *_module(quantize),
                f"--source={source}",
                f"--inputs={inputs}",
                f"--spec={artifacts.tokenizer_dir}",
                f"--output={checkpoint}",
                f"--precision={llm.precision}",
                f"--tp-size={llm.tp_size}",
                *([f"--kv-cache={llm.kv_cache}"] if llm.kv_cache else []),
            ],
            checkpoint.with_name("calibration.log"),
        )
    finally:
        shutil.rmtree(inputs, ignore_errors=True)


def _module(function: object) -> list[str]:
    return [sys.executable, "-m", str(getattr(function, "__module__", ""))]
