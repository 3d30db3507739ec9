"""Compare the artefacts of a model with its checkpoint run in PyTorch, and write a certificate."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build import container
from build.engines import default_precision
from build.fingerprint import checkpoint_hash, file_hashes
from build.machine import installed_version
from build.model_source import DEMO, artifact_name, resolve_checkpoint
from build.parity.certificate import Certificate
from build.parity.checks import Limits, Reference, compare, information
from build.parity.engine_outputs import EngineOutput, load_outputs
from build.parity.memory import check_memory
from build.parity.page import format_number, render_page
from build.parity.port import Port, Weights
from build.parity.questions import Question, verification_questions
from build.parity.stored_weights import BITS, stored_weights
from build.profile import PROFILES, choose_profile
from build.servable import check_servable
from build.verify_engines import engine_outputs
from export import stored_precision
from internvl_triton.artifacts import Artifacts, LLMBuild, Manifest, Profile
from internvl_triton.errors import ArtifactMismatch, BuildFailed
from internvl_triton.model_spec import ModelSpec
from internvl_triton.program import program

__all__ = ["certify", "verify"]

_REFERENCE_PACKAGES = ("torch", "transformers", "tokenizers", "pillow")


def verify(
    model: str,
    *,
    tp_size: int = 1,
    profile: str | None = None,
    precision: str | None = None,
    artifacts_dir: Path = Path("artifacts"),
) -> tuple[Certificate, Path]:
    """Run both sides, write certificate.json and certificate.html, and return their folder.

    The engines run first, then the reference reads what they answered: never both at once.

    Raises UnknownModel, DownloadFailed, InvalidTensorParallel, ArtifactMismatch (not built, or
    built from other files than MODEL is), BuildFailed (too little memory, no torch, a precision
    without a reference), ServerError.
    """
    chosen = choose_profile(profile)
    artifacts = Artifacts(artifacts_dir / artifact_name(model))
    artifacts.manifest()
    spec = artifacts.spec()
    spec.llm.check_tp_size(tp_size)
    llm = LLMBuild(precision or default_precision(spec), tp_size)
    stored_weights(llm.precision, stored="fp32", tp_size=tp_size)
    check_servable(artifacts, llm)
    checkpoint = resolve_checkpoint(model, artifacts_dir)
    _check_same_checkpoint(artifacts.manifest(), checkpoint, llm)
    _check_reference_installed()
    check_memory(spec, chosen)
    print(f"engines of {artifacts.name}, {llm.name}, {chosen} profile ...", flush=True)
    if chosen == "gpu" and not container.inside():
        outputs = _outputs_from_container(model, llm, artifacts_dir)
    else:
        outputs = engine_outputs(
            model,
            tp_size=tp_size,
            profile=chosen,
            precision=llm.precision,
            artifacts_dir=artifacts_dir,
        )
    questions = verification_questions()
    certificate = certify(artifacts, llm, chosen, checkpoint, questions, outputs)
    folder = artifacts.certificate_dir(llm, chosen)
    certificate.write(folder / "certificate.json")
    (folder / "certificate.html").write_text(render_page(certificate), encoding="utf-8")
    return certificate, folder


def certify(
    artifacts: Artifacts,
    llm: LLMBuild,
    profile: Profile,
    checkpoint: Path,
    questions: Sequence[Question],
    outputs: Sequence[EngineOutput],
) -> Certificate:
    """Run the reference along `outputs`, one for each question, and compare."""
    spec, manifest = ModelSpec.from_checkpoint(checkpoint), artifacts.manifest()
    stored = stored_precision(llm.precision, spec.dtype)
    weights = stored_weights(llm.precision, stored=stored, tp_size=llm.tp_size)
    answers = [output.answer.tolist() for output in outputs]
    references, image_token_id = _references(checkpoint, spec, questions, answers, weights)
    unquantised = None
    if llm.precision in BITS:
        unquantised, _ = _references(checkpoint, spec, questions, answers, None)
    checks = compare(
        outputs,
        references,
        spec=artifacts.spec(),
        reference_spec=spec,
        limits=Limits.of(profile),
        image_token_id=image_token_id,
    )
    made_of = "the checkpoint's weights"
    if llm.precision in BITS:
        made_of += f", quantised to {llm.precision} and dequantised for TP {llm.tp_size}"
    versions = {name: installed_version(name) or "" for name in _REFERENCE_PACKAGES}
    return Certificate(
        manifest=manifest,
        llm=llm,
        profile=profile,
        written_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        engines=_engines(profile),
        reference=f"transformers' InternVLForConditionalGeneration, fp32, eager, of {made_of}",
        versions={**manifest.versions, **versions},
        checks=checks,
        information=information(outputs, references, unquantised),
    )


def _engines(profile: Profile) -> str:
    if profile == "cpu":
        return "ONNX Runtime and the numpy engine, fp32; answers through Triton on the CPU"
    return "TensorRT, bf16; answers through Triton and TensorRT-LLM on GPUs"


def _references(
    checkpoint: Path,
    spec: ModelSpec,
    questions: Sequence[Question],
    answers: Sequence[list[int]],
    weights: Weights | None,
) -> tuple[list[Reference], int]:
    """What the reference makes of every question and answer, and its id of <IMG_CONTEXT>."""
    port = Port(checkpoint, weights=weights, streamed=True)
    references = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        print(f"reference: {question.name} ({number} of {len(questions)}) ...", flush=True)
        references.append(
            Reference.of(question, answer, checkpoint=checkpoint, spec=spec, port=port)
        )
    return references, port.image_token_id


def _check_same_checkpoint(manifest: Manifest, checkpoint: Path, llm: LLMBuild) -> None:
    found = checkpoint_hash(file_hashes(checkpoint, manifest.checkpoint_files))
    if found != manifest.checkpoint_sha256:
        raise ArtifactMismatch(
            f"{checkpoint} is not the checkpoint that the artefacts were made from ({found[:12]}, "
            f"the artefacts from {manifest.checkpoint_sha256[:12]}); run: make engines "
            f"MODEL={manifest.model} TP={llm.tp_size}"
        )


def _check_reference_installed() -> None:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise BuildFailed(
                f"the reference needs {package}, which is not installed: `make test-env` installs "
                "it, or says where to find a CPU build of torch"
            )


def _outputs_from_container(model: str, llm: LLMBuild, artifacts_dir: Path) -> list[EngineOutput]:
    with tempfile.TemporaryDirectory(dir=artifacts_dir) as scratch:
        output = Path(scratch).resolve() / "outputs.npz"
        container.run(
            "build.verify_engines",
            argparse.Namespace(
                model=model,
                tp_size=llm.tp_size,
                profile="gpu",
                precision=llm.precision,
                artifacts=artifacts_dir,
                output=output,
            ),
        )
        return load_outputs(output)


def _print(certificate: Certificate, folder: Path) -> None:
    for check in certificate.checks:
        print(
            f"{'ok  ' if check.passed else 'FAIL'} {check.name:<17} "
            f"{format_number(check.measured):>8}, limit {format_number(check.limit)} ({check.of})"
        )
    for name, value in certificate.information.items():
        print(f"     {name}: {value}")
    print(f"{'passed' if certificate.passed else 'FAILED'}: {folder / 'certificate.html'}")


@program(interrupted="interrupted; no certificate was written")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build.verify", description=__doc__)
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallelism (%(default)s)")
    parser.add_argument(
        "--profile", choices=PROFILES, help="default: gpu if there is one, else cpu"
    )
    parser.add_argument("--precision", help="precision of the language model (the checkpoint's)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background shell ignores it
        signal.signal(number, signal.default_int_handler)
    certificate, folder = verify(
        args.model,
        tp_size=args.tp_size,
        profile=args.profile,
        precision=args.precision,
        artifacts_dir=args.artifacts,
    )
    _print(certificate, folder)
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
