"""NVIDIA's aiperf against the OpenAI-compatible endpoint, its numbers beside ours.

    python -m benchmarks.aiperf --url http://127.0.0.1:9000/v1 --mix 1280x720

Writes the requests of a workload, pictures included, as aiperf's single-turn file, runs aiperf on
them, and then measures requests of the same kind with our own load generator. Tokens are counted by
the endpoint (`--use-server-token-count`), for both.

aiperf needs numpy 2, so it gets an environment of its own (1.2 GB), made when it is missing. It
loads a tokenizer, although the endpoint counts: that of --model.
"""

from __future__ import annotations

import argparse
import base64
import json
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
from benchmarks.targets import served_model
from benchmarks.workload import Case, GeneratedWorkload, Workload
from internvl_triton.artifacts import Artifacts
from internvl_triton.errors import BuildFailed, InvalidRequest
from internvl_triton.program import program

__all__ = ["command_line", "ensure_aiperf", "input_lines", "side_by_side"]

VERSION = "0.13.0"
ENVIRONMENT = Path("artifacts/aiperf-env")
LAST_LINES = 20
# Of our summary -> aiperf's name and statistic. Its inter_token_latency is our TPOT.
_SHOWN = {
    "requests_per_s": ("request_throughput", "avg"),
    "output_tokens_per_s": ("output_token_throughput", "avg"),
    "ttft_mean_ms": ("time_to_first_token", "avg"),
    "ttft_p50_ms": ("time_to_first_token", "p50"),
    "ttft_p99_ms": ("time_to_first_token", "p99"),
    "tpot_mean_ms": ("inter_token_latency", "avg"),
    "tpot_p50_ms": ("inter_token_latency", "p50"),
    "latency_mean_ms": ("request_latency", "avg"),
    "latency_p50_ms": ("request_latency", "p50"),
    "latency_p99_ms": ("request_latency", "p99"),
}


def ensure_aiperf(environment: Path) -> Path:
    """aiperf's program in `environment`, which is made if it is not there.

    Raises BuildFailed when pip cannot install it.
    """
    program = environment / "bin" / "aiperf"
    if not program.exists():
        print(f"installing aiperf {VERSION} into {environment} (1.2 GB) ...", flush=True)
        commands = (
            [sys.executable, "-m", "build.virtual_environment", str(environment)],
            [environment / "bin" / "python", "-m", "pip", "install", "-q", f"aiperf=={VERSION}"],
        )
        for command in commands:
            if subprocess.run(command).returncode:
                raise BuildFailed(f"aiperf {VERSION} could not be installed: see above")
    return program


def input_lines(workload: Workload, count: int) -> list[str]:
    """The lines of --input-file: `count` requests, the first turns of conversations 0, 1, ...

    Raises InvalidRequest for a workload with clips.
    """
    lines = []
    for number in range(count):
        conversation = workload.conversation(number)
        if conversation.videos:
            raise InvalidRequest("aiperf gets no clips here: leave video cases out of the mix")
        line: dict[str, Any] = {"text": conversation.prompts[0]}
        if conversation.images:
            line["images"] = [
                f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
                for image in conversation.images
            ]
        lines.append(json.dumps(line))
    return lines


def command_line(
    program: Path | str,
    url: str,
    model: str,
    *,
    tokenizer: str,
    data: Path,
    output: Path,
    requests: int,
    warm_up: int,
    concurrency: int,
    tokens: int,
) -> list[str]:
    """What is run; every answer has exactly `tokens` tokens."""
    options = {
        "--model": model,
        "--url": url.rstrip("/").removesuffix("/v1"),
        "--endpoint-type": "chat",
        "--tokenizer": tokenizer,
        "--input-file": str(data),
        "--custom-dataset-type": "single_turn",
        "--dataset-sampling-strategy": "sequential",
        "--request-count": str(requests),
        "--warmup-request-count": str(warm_up),
        "--concurrency": str(concurrency),
        "--extra-inputs": json.dumps(
            {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0.0}
        ),
        "--artifact-dir": str(output),
        "--ui": "none",
    }
    words = [word for option in options.items() for word in option]
    switches = ["--streaming", "--use-server-token-count", "--no-gpu-telemetry"]
    return [str(program), "profile", *words, *switches, "--no-server-metrics"]


def run_aiperf(command: Sequence[str], output: Path) -> dict[str, Any]:
    """aiperf's own summary. Raises BuildFailed with its last lines when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    exports = sorted(output.rglob("profile_export_aiperf.json"))
    if done.returncode or not exports:
        last = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
        raise BuildFailed(f"aiperf ended with exit code {done.returncode}. Its last lines:\n{last}")
    summary: dict[str, Any] = json.loads(exports[-1].read_text(encoding="utf-8"))
    if failed := (summary.get("error_request_count") or {}).get("avg"):
        raise BuildFailed(f"{failed:g} of aiperf's requests failed: {summary['error_summary']}")
    return summary


def side_by_side(theirs: dict[str, Any], ours: Sequence[RequestRecord]) -> list[list[str]]:
    """Header, then a row per metric. theirs: aiperf's summary."""
    summary = summarise(ours, SLO())
    rows = [["", "aiperf", "ours", "ours / theirs"]]
    for name, (metric, statistic) in _SHOWN.items():
        first, second = (theirs.get(metric) or {}).get(statistic), summary[name]
        if first and second:
            label = name.replace("_per_s", "/s").replace("_", " ")
            rows.append([label, f"{first:.4g}", f"{second:.4g}", f"{second / first:.3f}"])
    return rows


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aiperf", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--url", default="http://127.0.0.1:9000/v1", help="(%(default)s)")
    parser.add_argument(
        "--model",
        default="demo",
        help="whose tokenizer aiperf loads, from its artefacts (%(default)s)",
    )
    parser.add_argument("--tokenizer", type=Path, help="another tokenizer's directory")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="(%(default)s)")
    parser.add_argument("--mix", nargs="+", default=["448x448"], metavar="CASE", help="(448x448)")
    parser.add_argument("--requests", type=at_least(1), default=40, help="(%(default)s)")
    parser.add_argument("--concurrency", type=at_least(1), default=4, help="(%(default)s)")
    parser.add_argument("--output-tokens", type=at_least(1), default=32, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args(argv)

    def workload(part: int) -> GeneratedWorkload:  # 0 and 1: what perf_analyzer.py has shown
        length = Lengths(str(args.output_tokens))
        mix, seed = tuple(map(Case.parse, args.mix)), (args.seed, part)
        return GeneratedWorkload(mix, seed=seed, output_tokens=length)

    tokenizer = args.tokenizer or Artifacts(Path("artifacts") / Path(args.model).name).tokenizer_dir
    if not tokenizer.is_dir():
        raise InvalidRequest(
            f"{tokenizer} is no directory; give --model what was built, or --tokenizer"
        )
    model = served_model(args.url, timeout_s=30)
    program = ensure_aiperf(args.environment)
    with tempfile.TemporaryDirectory(prefix="aiperf-") as folder:
        data, output = Path(folder) / "input.jsonl", Path(folder) / "output"
        lines = input_lines(workload(2), args.requests + args.concurrency)
        data.write_text("\n".join([*lines, ""]), encoding="utf-8")
        command = command_line(
            program,
            args.url,
            model,
            tokenizer=str(tokenizer),
            data=data,
            output=output,
            requests=args.requests,
            warm_up=args.concurrency,
            concurrency=args.concurrency,
            tokens=args.output_tokens,
        )
        theirs = run_aiperf(command, output)
    load = Load(concurrency=args.concurrency, conversations=args.requests, warm_up=args.concurrency)
    ours = run_load_at(args.url, workload(3), load, timeout_s=300)
    shown = f"{' + '.join(args.mix)}, {args.output_tokens} tokens, {args.concurrency} at a time"
    print(f"{shown}\n\n{markdown_table(side_by_side(theirs, ours))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
