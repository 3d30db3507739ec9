"""MODEL -> everything a server needs, in artifacts/<model>/. Up-to-date steps are skipped."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from build.fingerprint import file_hashes, key_of, source_digest
from build.model_source import DEMO, artifact_name, resolve_checkpoint
from build.profile import PROFILES, choose_profile
from build.repository import SOURCE, assemble_repository
from internvl_triton.artifacts import Artifacts, LLMBuild, Manifest
from internvl_triton.errors import ArtifactMismatch, BuildFailed, InternVLTritonError
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec

__all__ = ["build_engines", "default_precision"]

PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_PACKAGES = ("numpy", "onnx", "onnxruntime", "tokenizers", "sentencepiece", "nvidia-pytriton")
_ROOT = Path(__file__).resolve().parent.parent
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class _Step:
    name: str
    key: str
    output: Path
    run: Callable[[], object]


def default_precision(spec: ModelSpec) -> str:
    """The checkpoint's own precision: bf16 for every published size."""
    return PRECISIONS[spec.dtype]


def build_engines(
    model: str,
    *,
    tp_size: int = 1,
    profile: str | None = None,
    precision: str | None = None,
    artifacts_dir: Path = Path("artifacts"),
    limits: dict[str, int] | None = None,
    only: Sequence[str] | None = None,
    progress: bool = True,
) -> Artifacts:
    """Bring artifacts/<model>/ up to date and return it.

    model: "demo", a published name, or a checkpoint directory.
    limits: fields of `Limits` that differ from their defaults.
    only: names of the steps to run, such as ("vision",); None runs all.

    Raises UnknownModel, DownloadFailed, InvalidCheckpoint, InvalidTensorParallel, BuildFailed.
    """
    name = artifact_name(model)
    choose_profile(profile)
    checkpoint = resolve_checkpoint(model, artifacts_dir)
    spec = ModelSpec.from_checkpoint(checkpoint)
    spec.llm.check_tp_size(tp_size)
    precision = precision or default_precision(spec)
    if precision not in PRECISIONS.values():
        raise BuildFailed(
            f"precision {precision!r} is not available in the cpu profile; "
            f"use one of {', '.join(PRECISIONS.values())}"
        )
    artifacts = Artifacts(artifacts_dir / name)
    artifacts.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(artifacts.root / ".lock", timeout=0)
    try:
        with lock:
            llm = LLMBuild(precision, tp_size)
            manifest = _new_manifest(artifacts, checkpoint, spec, limits, progress)
            steps = _steps(artifacts, checkpoint, manifest, llm, progress)
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
    manifest.checkpoint_sha256 = key_of([(name, hashes[name]["sha256"]) for name in sorted(hashes)])
    manifest.versions = _versions()
    manifest.limits = Limits.for_model(spec, **(limits or {})).to_json()
    return manifest


def _run(artifacts: Artifacts, manifest: Manifest, steps: Sequence[_Step]) -> None:
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
        }
        artifacts.write_manifest(manifest)
        print(f"{title}: done in {time.perf_counter() - started:.1f} s", flush=True)


def _steps(
    artifacts: Artifacts, checkpoint: Path, manifest: Manifest, llm: LLMBuild, progress: bool
) -> list[_Step]:
    from export import export_llm, export_vision

    made_from = manifest.checkpoint_sha256
    code = source_digest([*(_ROOT / "export").glob("*.py"), *_conversion_code()])
    llm_dir = artifacts.llm_checkpoint(llm)
    models = source_digest(SOURCE.glob("*/1/model.py"))
    rendering = source_digest(
        [_ROOT / "internvl_triton" / name for name in ("triton_config.py", "tensor_contract.py")]
    )
    return [
        _Step(
            "tokenizer",
            key_of(made_from),
            artifacts.tokenizer_dir / "config.json",
            lambda: _copy_tokenizer(checkpoint, artifacts.tokenizer_dir),
        ),
        _Step(
            "vision",
            key_of(made_from, code),
            artifacts.vision_onnx,
            lambda: export_vision(checkpoint, artifacts.vision_dir, progress=progress),
        ),
        _Step(
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
        _Step(
            "repository",
            key_of(made_from, models, rendering, llm, manifest.limits),
            artifacts.repository / "internvl" / "config.pbtxt",
            lambda: assemble_repository(artifacts, llm),
        ),
    ]


def _conversion_code() -> list[Path]:
    names = ("checkpoint", "checkpoint_layout", "model_spec", "safetensors_file")
    return [_ROOT / "internvl_triton" / f"{name}.py" for name in names]


def _copy_tokenizer(checkpoint: Path, target: Path) -> None:
    """config.json and the tokenizer files, checked by loading them."""
    from internvl_triton.tokenizer import load_tokenizer

    load_tokenizer(checkpoint)
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
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("internvl-triton", *_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.engines", description=__doc__)
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallelism (%(default)s)")
    parser.add_argument(
        "--profile", choices=PROFILES, help="default: gpu if there is one, else cpu"
    )
    parser.add_argument("--precision", help="weights of the language model (the checkpoint's)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    for limit in ("max-seq-len", "max-batch-size", "max-tiles-per-request"):
        parser.add_argument(f"--{limit}", type=int, help="deployment limit")
    args = parser.parse_args(argv)
    limits = {
        key: value
        for key in ("max_seq_len", "max_batch_size", "max_tiles_per_request")
        if (value := getattr(args, key)) is not None
    }
    try:
        artifacts = build_engines(
            args.model,
            tp_size=args.tp_size,
            profile=args.profile,
            precision=args.precision,
            artifacts_dir=args.artifacts,
            limits=limits,
        )
    except InternVLTritonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished steps are kept", file=sys.stderr)
        return 130
    print(f"{artifacts.root} is ready: make serve MODEL={args.model} TP={args.tp_size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
