"""What the OpenAI-compatible endpoint adds to gRPC, around engines that answer at once.

    python -m benchmarks.gateway_cost --model demo

The same requests go straight to the ensemble over gRPC and through the gateway, in turn, several
rounds each, so that whatever disturbs the machine disturbs both. Preprocessing, postprocessing,
Triton, the gateway and both clients are the real ones; the engines compute nothing. Load generator,
gateway and Triton share the machine's cores.

A third server takes the same HTTP requests and answers at once, with nothing behind it
(`paced_server.py`): its TTFT is what HTTP and JSON take by themselves, without a gateway's work.

TTFT is that of answers of one token: null engines give all tokens at once, so the second ones would
compete for the cores with the first one's way to the client, which no engine's do that takes time
for a token. Tokens are those of longer answers, as fast as they go. Medians over all requests; the
columns "added" are the median over rounds of the difference of a round's medians.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lengths import Lengths
from benchmarks.load import Load
from benchmarks.markdown import markdown_table
from benchmarks.metrics import defined, distribution, tpot_s, ttft_s
from benchmarks.option_types import at_least
from benchmarks.paced_server import paced_server
from benchmarks.pipeline_cost import answered, null_service
from benchmarks.running_gateway import running_gateway
from benchmarks.workload import Case, GeneratedWorkload
from internvl_triton.program import program

__all__ = ["gateway_rows"]

CASES = ("text", "448x448", "1280x720", "1920x1080")


def gateway_rows(
    grpc_url: str,
    gateway_url: str,
    at_once_url: str,
    cases: Sequence[str],
    *,
    requests: int,
    rounds: int,
    tokens: int,
    users: int,
) -> list[list[str]]:
    """Header, then one row per case; requests: per round, target and length.

    at_once_url: the OpenAI endpoint that answers at once.

    Raises RequestFailed when a request fails.
    """
    addresses = {"gRPC": f"grpc://{grpc_url}", "gateway": gateway_url, "HTTP alone": at_once_url}
    head = ["request", "TTFT ms, gRPC", "TTFT ms, gateway", "TTFT ms added"]
    head += ["TTFT ms, HTTP alone", "ms per token, gRPC", "ms per token, gateway"]
    rows = [[*head, "ms per token added"]]
    for case in cases:
        first, all_of_them = (
            GeneratedWorkload((Case.parse(case),), output_tokens=Lengths(str(count)))
            for count in (1, tokens)
        )
        load = Load(concurrency=users, conversations=requests, warm_up=users + 1)
        medians: dict[str, list[tuple[float, float]]] = {name: [] for name in addresses}
        for number in range(1 + rounds):
            for name in np.roll(list(addresses), number):
                ones = answered(addresses[name], first, load, case)
                longer = answered(addresses[name], all_of_them, load, case)
                ttft = distribution(defined(ttft_s, ones)).p50
                tpot = distribution(defined(tpot_s, longer)).p50
                medians[name].append((1000 * ttft, 1000 * tpot))
        ours, theirs, http = np.array(list(medians.values()))[:, 1:]  # the first round warms up
        ttft_added, token_added = np.median(theirs - ours, axis=0)
        ttft_cells = [f"{np.median(side[:, 0]):.2f}" for side in (ours, theirs, http)]
        tpot_cells = [f"{np.median(side[:, 1]):.3f}" for side in (ours, theirs)]
        ttft_cells.insert(2, f"{ttft_added:+.2f}")
        rows.append([case, *ttft_cells, *tpot_cells, f"{token_added:+.3f}"])
    return rows


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gateway_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="whose prompts and shapes (%(default)s)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="DIR")
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"({' '.join(CASES)})")
    parser.add_argument("--requests", type=at_least(1), default=60, help="per round (%(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="(%(default)s)")
    parser.add_argument(
        "--tokens", type=at_least(2), default=64, help="of the longer answers (%(default)s)"
    )
    parser.add_argument(
        "--users", type=at_least(1), default=1, help="at the same time (%(default)s)"
    )
    args = parser.parse_args(argv)
    with (
        null_service(args.model, args.artifacts) as grpc_url,
        running_gateway(grpc_url) as gateway,
        paced_server() as (_, at_once_url),
    ):
        rows = gateway_rows(
            grpc_url,
            gateway.url,
            at_once_url,
            args.cases,
            requests=args.requests,
            rounds=args.rounds,
            tokens=args.tokens,
            users=args.users,
        )
    cores = len(os.sched_getaffinity(0))
    shown = f"{args.users} user(s), {args.tokens} tokens, {args.rounds} rounds, {cores} cores"
    print(f"\nThe gateway on top of gRPC, null engines, {shown}\n\n{markdown_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
