"""NVIDIA's perf_analyzer against the ensemble, its numbers beside ours for the same workload.

    python -m benchmarks.perf_analyzer --server 127.0.0.1:8001 --mix 1280x720

Writes the requests of a workload as perf_analyzer's input file, runs it with gRPC streaming, reads
the times of every response from its export, computes our metrics from them (benchmarks/metrics.py),
and then measures the same requests with our own load generator.

perf_analyzer is on PyPI (`pip install perf-analyzer`; since 2.60 it needs glibc 2.38, and on an
older one pip installs an empty package), and in NVIDIA's Triton SDK container. --program names it;
a command of several words is split, so it can be run through another system's dynamic loader.

It counts the first response, ours the first one with text; it has no retries and no warm-up of its
own, so its first --concurrency responses are left out as our warm-up is.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lengths import Lengths
from benchmarks.load import Load, run_load
from benchmarks.markdown import markdown_table
from benchmarks.metrics import SLO
from benchmarks.records import RequestRecord
from benchmarks.summary import summarise
from benchmarks.targets import open_target
from benchmarks.workload import Case, GeneratedWorkload, Workload
from internvl_triton import tensor_contract as contract
from internvl_triton.errors import BuildFailed, InvalidRequest
from internvl_triton.program import program

__all__ = ["command_line", "input_data", "read_export"]

PROGRAM = "perf_analyzer"
_SHOWN = (
    "requests_per_s",
    "output_tokens_per_s",
    "ttft_mean_ms",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_mean_ms",
    "latency_mean_ms",
    "latency_p50_ms",
    "latency_p99_ms",
)


def input_data(workload: Workload, count: int) -> dict[str, Any]:
    """The file for --input-data: `count` requests, the first turns of conversations 0, 1, ...

    Raises InvalidRequest for a workload with clips or without one same number of tokens.
    """
    requests = []
    for number in range(count):
        conversation = workload.conversation(number)
        if conversation.videos:
            raise InvalidRequest("perf_analyzer gets no clips: leave video cases out of the mix")
        sampling = {
            **dict(conversation.sampling),
            "max_tokens": conversation.max_tokens[0],
            "min_tokens": conversation.max_tokens[0],
        }
        request: dict[str, Any] = {
            contract.TEXT_INPUT.name: {"content": [conversation.prompts[0]], "shape": [1]},
            contract.SAMPLING_PARAMETERS.name: {"content": [json.dumps(sampling)], "shape": [1]},
            contract.STREAM.name: {"content": [True], "shape": [1]},
        }
        if conversation.images:
            # Strings in bulk: each behind its length as four bytes, the lowest first.
            parts = (len(image).to_bytes(4, "little") + image for image in conversation.images)
            request[contract.IMAGES.name] = {
                "b64": base64.b64encode(b"".join(parts)).decode(),
                "shape": [len(conversation.images)],
            }
        requests.append(request)
    names = {tuple(request) for request in requests}
    if len(names) > 1:
        raise InvalidRequest(
            "perf_analyzer wants the same inputs in every request: no mix of text and pictures"
        )
    return {"data": requests}


def command_line(
    program: str, server: str, *, data: Path, export: Path, requests: int, concurrency: int
) -> list[str]:
    """What is run; `requests` of them, `concurrency` at a time."""
    options = {
        "-m": contract.ENSEMBLE.name,
        "-u": server,
        "-i": "grpc",
        "--input-data": str(data),
        "--concurrency-range": str(concurrency),
        "--request-count": str(requests),
        "--profile-export-file": str(export),
    }
    words = [word for option in options.items() for word in option]
    return [*shlex.split(program), "--async", "--streaming", *words]


def read_export(export: dict[str, Any], *, output_tokens: int) -> list[RequestRecord]:
    """Records of a --profile-export-file, in the order of sending. Raises InvalidRequest.

    Times there are nanoseconds of one clock. Tokens are not in it: `output_tokens` of each answer.
    """
    try:
        (experiment,) = export["experiments"]
        requests = sorted(experiment["requests"], key=lambda request: request["timestamp"])
        return [
            RequestRecord(
                number,
                sent_s=request["timestamp"] / 1e9,
                chunks_s=[stamp / 1e9 for stamp in request["response_timestamps"]],
                ended_s=max(request["response_timestamps"]) / 1e9,
                output_tokens=output_tokens,
            )
            for number, request in enumerate(requests)
            if request["response_timestamps"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"this is no export of one perf_analyzer run: {error!r}") from error


def run_perf_analyzer(
    program: str, server: str, workload: Workload, *, requests: int, concurrency: int, tokens: int
) -> list[RequestRecord]:
    """Raises BuildFailed with its last lines when it fails, or is not there."""
    if shutil.which(shlex.split(program)[0]) is None:
        raise BuildFailed(
            f"{program!r} is not on PATH; see the beginning of benchmarks/perf_analyzer.py"
        )
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as folder:
        data, export = Path(folder) / "input.json", Path(folder) / "export.json"
        data.write_text(json.dumps(input_data(workload, requests)), encoding="utf-8")
        command = command_line(
            program, server, data=data, export=export, requests=requests, concurrency=concurrency
        )
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not export.exists():
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
            raise BuildFailed(
                f"perf_analyzer ended with exit code {done.returncode}; its last lines:\n{last}"
            )
        # It copies the pictures' bytes into strings, whatever they are.
        text = export.read_bytes().decode(errors="replace")
        return read_export(json.loads(text, strict=False), output_tokens=tokens)


async def _run_ours(server: str, workload: Workload, load: Load) -> list[RequestRecord]:
    target = open_target(f"grpc://{server}", timeout_s=300)
    try:
        return await run_load(target, workload, load)
    finally:
        await target.close()


def side_by_side(theirs: Sequence[RequestRecord], ours: Sequence[RequestRecord]) -> list[list[str]]:
    """Header, then a row per metric."""
    one, other = summarise(theirs, SLO()), summarise(ours, SLO())
    rows = [["", "perf_analyzer", "ours", "ours / theirs"]]
    for name in _SHOWN:
        first, second = one[name], other[name]
        if first and second:
            label = name.replace("_per_s", "/s").replace("_", " ")
            rows.append([label, f"{first:.4g}", f"{second:.4g}", f"{second / first:.3f}"])
    return rows


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perf_analyzer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--server", default="127.0.0.1:8001", help="gRPC (%(default)s)")
    parser.add_argument("--program", default=PROGRAM, help="(%(default)s)")
    parser.add_argument("--mix", nargs="+", default=["448x448"], metavar="CASE", help="(448x448)")
    parser.add_argument("--requests", type=int, default=40, help="(%(default)s)")
    parser.add_argument("--concurrency", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--output-tokens", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--write-input", type=Path, help="only write perf_analyzer's input file")
    args = parser.parse_args(argv)

    def workload(seed: int) -> GeneratedWorkload:  # pictures that the other has not shown
        length = Lengths(str(args.output_tokens))
        return GeneratedWorkload(tuple(map(Case.parse, args.mix)), seed=seed, output_tokens=length)

    if args.write_input:
        text = json.dumps(input_data(workload(args.seed), args.requests))
        args.write_input.write_text(text, encoding="utf-8")
        print(f"wrote {args.write_input}")
        return 0
    theirs = run_perf_analyzer(
        args.program,
        args.server,
        workload(args.seed),
        requests=args.requests + args.concurrency,
        concurrency=args.concurrency,
        tokens=args.output_tokens,
    )
    for record in theirs[: args.concurrency]:
        record.warm_up = True
    load = Load(concurrency=args.concurrency, conversations=args.requests, warm_up=args.concurrency)
    ours = asyncio.run(_run_ours(args.server, workload(args.seed + 1), load))
    shown = f"{' + '.join(args.mix)}, {args.output_tokens} tokens, {args.concurrency} at a time"
    print(f"{shown}\n\n{markdown_table(side_by_side(theirs, ours))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
