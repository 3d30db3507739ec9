"""Times of engines beside the planner's floors, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.trtllm_bench import Case, LlmTime
from benchmarks.vision_engine_time import VisionTime

if TYPE_CHECKING:
    from build import Floors

__all__ = ["llm_floors", "llm_rows", "vision_rows"]

Rows = list[list[str]]


def vision_rows(times: Sequence[VisionTime], floors: Floors | None) -> Rows:
    """Header, then a row per number of tiles; floors and calls where there are any."""
    called = any(each.call_ms is not None for each in times)
    head = ["tiles", "ms", "p90", "ms per tile"]
    head += ["with copy and wait"] if called else []
    head += ["floor", "/ floor"] if floors else []
    rows = [head]
    for each in times:
        row = [str(each.num_tiles), _ms(each.median_ms), _ms(each.p90_ms)]
        row.append(_ms(each.median_ms / each.num_tiles))
        if called:
            row.append("-" if each.call_ms is None else _ms(each.call_ms))
        if floors:
            row += _beside(each.median_ms, 1000 * floors.vision_s(each.num_tiles))
        rows.append(row)
    return rows


def llm_floors(case: Case, floors: Floors) -> dict[str, float]:
    """ttft_ms of a prompt that waits for nobody, tpot_ms of a full batch, output_tokens_per_s."""
    context = case.prompt_tokens + case.output_tokens / 2
    return {
        "ttft_ms": 1000 * floors.prefill_s(case.prompt_tokens),
        "tpot_ms": 1000 * floors.step_s(case.concurrency, context),
        "output_tokens_per_s": floors.output_tokens_per_s(
            batch_size=case.concurrency,
            num_tiles=0,
            prompt_tokens=case.prompt_tokens,
            output_tokens=case.output_tokens,
        ),
    }


def llm_rows(cases: Sequence[Case], times: Sequence[LlmTime], floors: Floors | None) -> Rows:
    """Header, then a row per case."""
    beside = ["floor", "/ floor"] if floors else []
    head = ["", "TTFT ms", *beside, "ms per token", *beside, "tokens/s"]
    rows = [head + (["at most", "of it"] if floors else [])]
    for case, each in zip(cases, times, strict=True):
        how = "latency" if case.command == "latency" else f"{case.concurrency} at a time"
        tiles = f"{case.num_tiles} tile{'s' if case.num_tiles != 1 else ''}"
        row = [f"{tiles}: {case.prompt_tokens} + {case.output_tokens} tokens, {how}"]
        least = llm_floors(case, floors) if floors else {}
        for name, measured in (("ttft_ms", each.ttft_ms), ("tpot_ms", each.tpot_ms)):
            row += [_ms(measured), *(_beside(measured, least[name]) if least else [])]
        row.append(f"{each.output_tokens_per_s:,.0f}")
        if least:
            most = least["output_tokens_per_s"]
            row += [f"{most:,.0f}", f"{each.output_tokens_per_s / most:.0%}"]
        rows.append(row)
    return rows


def _beside(measured_ms: float, floor_ms: float) -> list[str]:
    return [_ms(floor_ms), f"{measured_ms / floor_ms:.2f}"]


def _ms(value: float) -> str:
    return f"{value:,.2f}"
