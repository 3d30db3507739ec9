"""NVIDIA's perf_analyzer against the ensemble, its numbers beside ours for the same workload.

    python -m benchmarks.perf_analyzer --server 127.0.0.1:8001 --mix 1280x720

Writes the requests of a workload as perf_analyzer's input file, runs it with gRPC streaming, reads
the times of every response from its export, computes our metrics from them (benchmarks/metrics.py),
and then measures requests of the same kind with our own load generator: with other pictures, which
the server has not seen.

Without --program it installs the perf_analyzer that the PyPI package `tritonclient` 2.51 carries,
the last one for a glibc before 2.38, with the two libraries that it wants (25 MB in artifacts/).
--program names another one, such as that of NVIDIA's Triton SDK container.

It counts the first response, ours the first one with text; it has no retries and no warm-up of its
own, so its first --concurrency responses are left out as our warm-up is.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lengths import Lengths
from benchmarks.load import Load, run_load_at
from benchmarks.markdown import markdown_table
from benchmarks.metrics import SLO
from benchmarks.option_types import at_least
from benchmarks.records import RequestRecord
from benchmarks.summary import summarise
from benchmarks.workload import Case, GeneratedWorkload, Workload
from build import PackageUnavailable, unpack_package
from internvl_triton import tensor_contract as contract
from internvl_triton.errors import BuildFailed, InvalidRequest
from internvl_triton.program import program

__all__ = ["command_line", "ensure_perf_analyzer", "input_data", "read_export"]

FOLDER = Path("artifacts") / "perf-analyzer"
_PACKAGES = ("tritonclient==2.51.0", "nvidia-cuda-runtime-cu12==12.6.77")
_LIBRARY = "libb64-0d"  # Debian's and Ubuntu's package
_EXPERIMENT = b'{"experiment":'
_REQUEST = re.compile(rb'{"timestamp":(\d+),.*?"response_timestamps":\[([\d,]*)\]', re.DOTALL)
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


def ensure_perf_analyzer(folder: Path) -> str:
    """The program in `folder`, as words of a command line; installed if it is not there.

    Raises BuildFailed when a package cannot be had.
    """
    program = folder / "bin" / "perf_analyzer"
    if not program.exists():
        print(f"installing perf_analyzer into {folder} (25 MB) ...", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished:
            whole = Path(unfinished) / folder.name
            if subprocess.run([*pip, "--target", str(whole), *_PACKAGES]).returncode:
                raise BuildFailed(f"{' '.join(_PACKAGES)} could not be installed: see above")
            try:
                unpack_package(_LIBRARY, whole)
            except PackageUnavailable as error:
                raise BuildFailed(f"{error}; --program names a perf_analyzer that runs") from error
            shutil.rmtree(folder, ignore_errors=True)
            whole.rename(folder)
    libraries = [folder / "nvidia/cuda_runtime/lib", *(folder / "usr/lib").glob("*-linux-gnu")]
    path = ":".join(str(library.resolve()) for library in libraries)
    return shlex.join(["env", f"LD_LIBRARY_PATH={path}", str(program)])


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


def read_export(export: bytes, *, output_tokens: int) -> list[RequestRecord]:
    """Records of a --profile-export-file, in the order of sending. Raises InvalidRequest.

    Times there are nanoseconds of one clock. Tokens are not in it: `output_tokens` of each answer.
    A request without a response has failed. The file is no JSON where a picture went along: its
    bytes stand there as they are, some without the escapes that a string needs.
    """
    found = _REQUEST.findall(export)
    if export.count(_EXPERIMENT) != 1 or not found:
        raise InvalidRequest(
            f"this is no export of one perf_analyzer run: it begins with {export[:80]!r}"
        )
    sent = sorted(
        (int(stamp), [int(s) for s in responses.split(b",") if s]) for stamp, responses in found
    )
    return [_record(number, *times, output_tokens) for number, times in enumerate(sent)]


def _record(
    number: int, sent_ns: int, responses_ns: Sequence[int], output_tokens: int
) -> RequestRecord:
    if not responses_ns:
        sent_s = sent_ns / 1e9
        return RequestRecord(number, sent_s=sent_s, ended_s=sent_s, error="no response")
    return RequestRecord(
        number,
        sent_s=sent_ns / 1e9,
        chunks_s=[stamp / 1e9 for stamp in responses_ns],
        ended_s=max(responses_ns) / 1e9,
        output_tokens=output_tokens,
    )


def run_perf_analyzer(
    program: str, server: str, workload: Workload, *, requests: int, concurrency: int, tokens: int
) -> list[RequestRecord]:
    """Raises BuildFailed with its last lines when it fails, or is not there."""
    if shutil.which(shlex.split(program)[0]) is None:
        raise BuildFailed(f"{program!r} is not on PATH; without --program it is installed")
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
        return read_export(export.read_bytes(), output_tokens=tokens)


def side_by_side(theirs: Sequence[RequestRecord], ours: Sequence[RequestRecord]) -> list[list[str]]:
    """Header, then a row per metric."""
    one, other = summarise(theirs, SLO()), summarise(ours, SLO())
    rows = [["", "perf_analyzer", "ours", "ours / theirs"]]
    rows.append(["failed", f"{one['failed']:g}", f"{other['failed']:g}", ""])
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
    parser.add_argument("--program", help=f"(one that is installed into {FOLDER})")
    parser.add_argument("--mix", nargs="+", default=["448x448"], metavar="CASE", help="(448x448)")
    parser.add_argument("--requests", type=at_least(1), default=40, help="(%(default)s)")
    parser.add_argument("--concurrency", type=at_least(1), default=4, help="(%(default)s)")
    parser.add_argument("--output-tokens", type=at_least(1), default=32, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--write-input", type=Path, help="only write perf_analyzer's input file")
    args = parser.parse_args(argv)

    def workload(part: int) -> GeneratedWorkload:  # pictures that the other has not shown
        length = Lengths(str(args.output_tokens))
        mix, seed = tuple(map(Case.parse, args.mix)), (args.seed, part)
        return GeneratedWorkload(mix, seed=seed, output_tokens=length)

    if args.write_input:
        text = json.dumps(input_data(workload(0), args.requests))
        try:
            args.write_input.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(
                f"--write-input {args.write_input} cannot be written ({error.strerror})"
            ) from error
        print(f"wrote {args.write_input}")
        return 0
    theirs = run_perf_analyzer(
        args.program or ensure_perf_analyzer(FOLDER),
        args.server,
        workload(0),
        requests=args.requests + args.concurrency,
        concurrency=args.concurrency,
        tokens=args.output_tokens,
    )
    for record in theirs[: args.concurrency]:
        record.warm_up = True
    load = Load(concurrency=args.concurrency, conversations=args.requests, warm_up=args.concurrency)
    ours = run_load_at(f"grpc://{args.server}", workload(1), load, timeout_s=300)
    shown = f"{' + '.join(args.mix)}, {args.output_tokens} tokens, {args.concurrency} at a time"
    print(
        f"{shown}\n\n{markdown_table(side_by_side(theirs, ours))}\n\n"
        "Theirs count every response, also one without text; ours begin at the first text."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
