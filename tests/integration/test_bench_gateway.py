"""The gateway's cost, measured in front of a server whose TTFT and token gap are set."""

from __future__ import annotations

from benchmarks.gateway_cost import gateway_rows
from benchmarks.paced_server import paced_server
from benchmarks.running_gateway import running_gateway

TTFT_S, GAP_S = 0.2, 0.05


def test_both_ways_show_the_servers_times() -> None:
    with (
        paced_server(ttft_s=TTFT_S, gap_s=GAP_S) as (address, _),
        paced_server() as (_, at_once_url),
    ):
        grpc_url = address.removeprefix("grpc://")
        with running_gateway(grpc_url) as gateway:
            head, row = gateway_rows(
                grpc_url,
                gateway.url,
                at_once_url,
                ["64x64"],
                requests=1,
                rounds=1,
                tokens=4,
                users=1,
            )
    cells = dict(zip(head, row, strict=True))
    assert cells["request"] == "64x64"
    for name in ("gRPC", "gateway"):
        ttft_ms, token_ms = (
            float(cells[f"{what}, {name}"]) for what in ("TTFT ms", "ms per token")
        )
        assert 1000 * TTFT_S <= ttft_ms < 2000 * TTFT_S
        # A late first chunk makes the gaps shorter; the last one never comes before its time.
        assert ttft_ms + 3 * token_ms + 0.1 >= 1000 * (TTFT_S + 3 * GAP_S)
    assert cells["TTFT ms added"][0] in "+-"
    assert 0 < float(cells["TTFT ms, HTTP alone"]) < 1000 * TTFT_S
