"""Run the artefacts on the verification's questions and write what they answer to a file.

`make verify` starts this where the engines run: for the gpu profile that is inside the container,
which has no transformers that knows InternVL.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from build.engines import default_precision
from build.model_source import DEMO, artifact_name
from build.parity.engine_outputs import EngineOutput, ask_with, run_engines, save_outputs
from build.parity.questions import Question, verification_questions
from build.profile import PROFILES, choose_profile
from build.serve import READY_TIMEOUT_S, make_server
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.client import Client
from internvl_triton.program import program
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.triton_server import find_free_port

__all__ = ["engine_outputs"]

ANSWER_TIMEOUT_S = 3600.0  # of one question: a large model answers slowly on a CPU


def engine_outputs(
    model: str,
    *,
    tp_size: int = 1,
    profile: str | None = None,
    precision: str | None = None,
    artifacts_dir: Path = Path("artifacts"),
) -> list[EngineOutput]:
    """One output per question, through preprocessing, vision engine and a server of its own.

    Raises what `make_server` raises, ServerStartFailed and ServerUnavailable.
    """
    chosen = choose_profile(profile)
    artifacts = Artifacts(artifacts_dir / artifact_name(model))
    end_id = load_tokenizer(artifacts.tokenizer_dir).end_id

    def answers(questions: Sequence[Question]) -> list[list[int]]:
        server = make_server(
            model,
            tp_size=tp_size,
            profile=chosen,
            precision=precision,
            artifacts_dir=artifacts_dir,
            http_port=find_free_port(),
            grpc_port=find_free_port(),
            metrics_port=find_free_port(),
        )
        print("starting Triton ...", flush=True)
        with server:
            server.wait_ready(READY_TIMEOUT_S)
            with Client(server.grpc_url, timeout_s=ANSWER_TIMEOUT_S) as client:
                return ask_with(client, end_id, questions)

    spec = artifacts.spec()
    llm = LLMBuild(precision or default_precision(spec), tp_size)
    return run_engines(artifacts, llm, chosen, verification_questions(), answers)


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m build.verify_engines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default=DEMO, help="name or checkpoint directory (%(default)s)")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor parallelism (%(default)s)")
    parser.add_argument("--profile", choices=PROFILES, help="default: gpu if there is one")
    parser.add_argument("--precision", help="precision of the language model (the checkpoint's)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npz to write")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    outputs = engine_outputs(
        args.model,
        tp_size=args.tp_size,
        profile=args.profile,
        precision=args.precision,
        artifacts_dir=args.artifacts,
    )
    save_outputs(args.output, outputs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
