"""MODEL -> everything a server needs, in artifacts/<model>/. Up-to-date steps are skipped."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from build import container
from build.calibration.steps import calibration_steps
from build.fingerprint import checkpoint_hash, file_hashes, key_of, source_digest
from build.gpu_precision import check_cpu_choice, check_gpu_choice, needs_calibration
from build.gpu_steps import gpu_steps
from build.machine import Machine, check_buildable, installed_version, this_machine
from build.model_source import DEMO, artifact_name, resolve_checkpoint
from build.planner.fits import check_fits
from build.profile import PROFILES, choose_profile
from build.repository import SOURCE, assemble_repository
from build.step import Step
from export import check_precision
from internvl_triton.artifacts import Artifacts, LLMBuild, Manifest, Profile
from internvl_triton.errors import (
    ArtifactMismatch,
    BuildFailed,
    InvalidCheckpoint,
)
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.program import program

__all__ = ["build_engines", "default_precision"]

PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_PACKAGES = (
    "internvl-triton",
    "numpy",
    "onnx",
    "onnxruntime",
    "tokenizers",
    "sentencepiece",
    "nvidia-pytriton",
    "tensorrt",
    "tensorrt_llm",
)
_ROOT = Path(__file__).resolve().parent.parent
_LIMIT_OPTIONS = (
    "max_seq_len",
    "max_batch_size",
    "max_kv_cache_tokens",
    "max_tiles_per_request",
    "max_tiles_per_run",
)
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


def default_precision(spec: ModelSpec) -> str:
    """The checkpoint's own precision: bf16 for every published size."""
    return PRECISIONS[spec.dtype]


def build_engines(
    model: str,
    *,
    tp_size: int = 1,
    profile: str | None = None,
    precision: str | None = None,
    kv_cache: str | None = None,
    calibration: Path | None = None,
    artifacts_dir: Path = Path("artifacts"),
    limits: dict[str, int] | None = None,
    only: Sequence[str] | None = None,
    progress: bool = True,
) -> Artifacts:
    """Bring artifacts/<model>/ up to date and return it.

    model: "demo", a published name, or a checkpoint directory.
    profile: "gpu" compiles engines too, for the GPUs of this machine and inside the pinned
    container; None is gpu where there is a GPU, else cpu.
    kv_cache: "fp8" or "int8", for the gpu profile; None has 16 bits.
    calibration: a directory of pictures and prompts (`build.calibration.samples`) for what is
    calibrated; None has the built-in ones.
    limits: fields of `Limits` that differ from their defaults.
    only: names of the steps to run, such as ("vision",); None runs all.

    Raises UnknownModel, DownloadFailed, InvalidCheckpoint, InvalidTensorParallel, BuildFailed.
    """
    name = artifact_name(model)
    chosen = choose_profile(profile)
    machine = this_machine() if chosen == "gpu" else None
    if machine is not None:
        check_buildable(machine)
    checkpoint = resolve_checkpoint(model, artifacts_dir)
    spec = ModelSpec.from_checkpoint(checkpoint)
    spec.llm.check_tp_size(tp_size)
    precision = precision or default_precision(spec)
    if machine is None:
        check_cpu_choice(precision, kv_cache)
        check_precision(spec, precision, tp_size)
    else:
        check_gpu_choice(
            spec,
            precision=precision,
            kv_cache=kv_cache,
            tp_size=tp_size,
            gpu=machine.gpus[0].name,
            compute_capability=machine.gpus[0].compute_capability,
        )
    if machine is not None and only is None:
        checked = Limits.for_model(spec, **(limits or {}))
        gpu = machine.gpus[0].name
        print(
            check_fits(
                spec,
                limits=checked,
                gpu=gpu,
                tp_size=tp_size,
                precision=precision,
                kv_cache=kv_cache or "auto",
            )
        )
    artifacts = Artifacts(artifacts_dir / name)
    artifacts.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(artifacts.root / ".lock", timeout=0)
    try:
        with lock:
            llm = LLMBuild(precision, tp_size, kv_cache)
            manifest = _new_manifest(artifacts, checkpoint, spec, limits, progress)
            steps = _steps(artifacts, checkpoint, manifest, llm, machine, calibration, progress)
            _run(artifacts, manifest, [s for s in steps if only is None or s.name in only])
    except Timeout as error:
        raise BuildFailed(
            f"another build of {name} is running (it holds {artifacts.root / '.lock'}); "
            "wait for it, or stop it"
        ) from error
    return artifacts


def _new_manifest(
    artifacts: Artifacts,
    checkpoint: Path,
    spec: ModelSpec,
    limits: dict[str, int] | None,
    progress: bool,
) -> Manifest:
    """The manifest of this run: today's inputs, and the steps that earlier runs finished."""
    try:
        manifest = artifacts.manifest()
    except ArtifactMismatch:
        manifest = Manifest(model=artifacts.name)
    hashes = file_hashes(checkpoint, manifest.checkpoint_files, progress=progress)
    manifest.checkpoint_files = hashes
    manifest.checkpoint_sha256 = checkpoint_hash(hashes)
    manifest.versions = _versions()
    manifest.limits = Limits.for_model(spec, **(limits or {})).to_json()
    return manifest


def _run(artifacts: Artifacts, manifest: Manifest, steps: Sequence[Step]) -> None:
    """Run what is out of date; the manifest names a step only while its output is whole."""
    artifacts.write_manifest(manifest)
    for number, step in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if manifest.steps.get(step.name, {}).get("key") == step.key and step.output.exists():
            print(f"{title}: up to date", flush=True)
            continue
        print(f"{title} ...", flush=True)
        manifest.steps.pop(step.name, None)
        artifacts.write_manifest(manifest)
        started = time.perf_counter()
        step.run()
        manifest.steps[step.name] = {
            "key": step.key,
            "checkpoint_sha256": manifest.checkpoint_sha256,
            **step.made_with,
        }
        artifacts.write_manifest(manifest)
        print(f"{title}: done in {time.perf_counter() - started:.1f} s", flush=True)


def _steps(
    artifacts: Artifacts,
    checkpoint: Path,
    manifest: Manifest,
    llm: LLMBuild,
    machine: Machine | None,
    calibration: Path | None,
    progress: bool,
) -> list[Step]:
    """All steps; those of the gpu profile if `machine` is given."""
    from export import export_llm, export_vision

    profile: Profile = "cpu" if machine is None else "gpu"
    made_from = manifest.checkpoint_sha256
    code = source_digest([*(_ROOT / "export").glob("*.py"), *_conversion_code()])
    llm_dir = artifacts.llm_checkpoint(llm)
    models = source_digest(SOURCE.glob("*/1/model.py"))
    rendering = source_digest(
        [
            _ROOT / "internvl_triton" / f"{name}.py"
            for name in ("triton_config", "tensor_contract", "gpu_deployment")
        ]
    )
    portable = [
        Step(
            "tokenizer",
            key_of(made_from),
            artifacts.tokenizer_dir / "config.json",
            lambda: _copy_tokenizer(checkpoint, artifacts.tokenizer_dir),
        ),
        Step(
            "vision",
            key_of(made_from, code),
            artifacts.vision_onnx,
            lambda: export_vision(checkpoint, artifacts.vision_dir, progress=progress),
        ),
        Step(
            llm.step,
            key_of(made_from, code, llm),
            llm_dir / "config.json",
            lambda: export_llm(
                checkpoint,
                llm_dir,
                tp_size=llm.tp_size,
                precision=llm.precision,
                progress=progress,
            ),
        ),
    ]
    repository = Step(
        "repository",
        key_of(made_from, models, rendering, llm, manifest.limits, profile),
        artifacts.repository / "internvl" / "config.pbtxt",
        lambda: assemble_repository(artifacts, llm, profile),
    )
    if machine is None:
        return [*portable, repository]
    calibrated = []
    if needs_calibration(llm.precision, llm.kv_cache):
        portable.pop()  # its checkpoint is made with the vision engine's features instead
        calibrated = calibration_steps(
            artifacts, manifest, llm, checkpoint, code, calibration, progress
        )
    on_gpu = gpu_steps(artifacts, manifest, llm, machine, code, calibrated, progress)
    return [*portable, *on_gpu, repository]


def _conversion_code() -> list[Path]:
    names = ("checkpoint", "checkpoint_layout", "model_spec", "safetensors_file")
    return [_ROOT / "internvl_triton" / f"{name}.py" for name in names]


def _copy_tokenizer(checkpoint: Path, target: Path) -> None:
    """config.json and the tokenizer files, checked by loading them."""
    from internvl_triton.tokenizer import load_tokenizer

    found = len(load_tokenizer(checkpoint))
    vocab_size = ModelSpec.from_checkpoint(checkpoint).llm.vocab_size
    if found > vocab_size:
        raise InvalidCheckpoint(
            f"the tokenizer has {found} ids, and the language model {vocab_size} (vocab_size): "
            "those beyond would select visual features; take the tokenizer of this checkpoint"
        )
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for pattern in _TOKENIZER_FILES:
        for file in checkpoint.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, temporary / file.name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def _versions() -> dict[str, str]:
    found = {package: installed_version(package) for package in _PACKAGES}
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version for name, version in found.items() if version}}


@program(interrupted="interrupted; finished steps are kept")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.engines", description=__doc__)
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallelism (%(default)s)")
    parser.add_argument(
        "--profile", choices=PROFILES, help="default: gpu if there is one, else cpu"
    )
    parser.add_argument("--precision", help="weights of the language model (the checkpoint's)")
    parser.add_argument("--kv-cache", help="fp8 or int8 keys and values, gpu profile (16 bits)")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="pictures and prompts for int4_awq, fp8, int8_sq and --kv-cache (built-in ones)",
    )
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    for limit in _LIMIT_OPTIONS:
        parser.add_argument(
            f"--{limit.replace('_', '-')}", type=int, metavar="N", help="deployment limit"
        )
    args = parser.parse_args(argv)
    limits = {
        limit: value for limit in _LIMIT_OPTIONS if (value := getattr(args, limit)) is not None
    }
    # Ending it in any way ends the compilers that it started.
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background shell ignores it
        signal.signal(number, signal.default_int_handler)
    container.enter_container("build.engines", args)
    artifacts = build_engines(
        args.model,
        tp_size=args.tp_size,
        profile=args.profile,
        precision=args.precision,
        kv_cache=args.kv_cache,
        calibration=args.calibration,
        artifacts_dir=args.artifacts,
        limits=limits,
    )
    print(f"{artifacts.root} is ready: make serve MODEL={args.model} TP={args.tp_size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
