"""`make plan`: its program, its tables and its errors."""

import json
import re
from pathlib import Path

import pytest

from build import plan
from build.planner.tables import text_of, title_of
from internvl_triton.errors import BuildFailed, InvalidCheckpoint, UnknownModel
from internvl_triton.published_models import published_config


def sections(report: dict) -> dict[str, list[dict]]:
    return {
        name: value
        for name, value in report.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    }


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = plan.main(list(arguments))
    return code, capsys.readouterr().out


def test_json_holds_what_the_tables_show(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "InternVL2_5-26B", "--gpu", "A100-80G", "--tp-size", "2")
    code, printed = run(capsys, *arguments)
    assert code == 0
    code, as_json = run(capsys, *arguments, "--json")
    assert code == 0
    report = json.loads(as_json)
    assert len(sections(report)) == 7
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    for name, rows in sections(report).items():
        assert [name] in lines
        for row in rows:
            cells = [text for text in (text_of(*item) for item in row.items()) if text]
            assert cells in lines, (name, row)
    assert report["fits"] is True
    assert "It fits. The smallest TP that fits is 1." in printed
    assert printed.count(report["note"]) == 1


def test_flags_are_those_of_make_engines() -> None:
    report = plan.make_plan(
        "InternVL2_5-26B", gpu="H100", tp_size=2, images=2, limits={"max_batch_size": 4}
    )
    flags = {row["flag"]: row["value"] for row in report["trtllm-build flags"]}
    assert flags["--max_batch_size"] == "4"
    assert flags["--max_multimodal_len"] == str(4 * 2 * 13 * 256)
    assert flags["--max_seq_len"] == flags["--max_num_tokens"] == "32768"
    assert flags["--use_paged_context_fmha"] == "enable"
    assert not any("dir" in flag for flag in flags)


@pytest.mark.parametrize(
    ("precision", "kv_cache", "paged", "fp8", "fused"),
    [
        ("bf16", "auto", "enable", "disable", "enable"),
        ("bf16", "fp8", "disable", "disable", "enable"),
        ("int8", "int8", "disable", "disable", "disable"),
        ("fp8", "fp8", "enable", "enable", "enable"),
        ("fp8", "auto", "enable", "disable", "enable"),
    ],
)
def test_flags_of_quantised_engines(
    precision: str, kv_cache: str, paged: str, fp8: str, fused: str
) -> None:
    report = plan.make_plan("InternVL2_5-8B", gpu="H100", precision=precision, kv_cache=kv_cache)
    flags = {row["flag"]: row["value"] for row in report["trtllm-build flags"]}
    assert flags["--use_paged_context_fmha"] == paged
    assert flags["--use_fp8_context_fmha"] == fp8
    assert flags["--use_fused_mlp"] == fused


def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(capsys, "--model", "InternVL2_5-78B", "--gpu", "A100-80G")
    assert code == 1
    assert "It does not fit. What would:\n  TP=4 (" in printed
    assert "trtllm-build flags" not in printed
    report = plan.make_plan("InternVL2_5-78B", gpu="A100-80G")
    assert (report["fits"], report["smallest_tp_size"]) == (False, 4)


def test_a_directory_needs_only_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config("InternVL2_5-4B")))
    by_name = plan.make_plan("InternVL2_5-4B", gpu="L4")
    by_directory = plan.make_plan(str(tmp_path), gpu="L4")
    assert by_directory == by_name | {"model": tmp_path.name}
    assert plan.make_plan("InternVL2_5-4B-MPO", gpu="L4")["memory of one GPU"]
    assert plan.make_plan("demo", gpu="L4")["fits"]


def test_a_request_is_counted() -> None:
    report = plan.make_plan(
        "InternVL2_5-8B", gpu="H100", images=2, max_tiles=6, prompt_tokens=100, output_tokens=50
    )
    cache = {row["what"]: row["number"] for row in report["KV cache"]}
    assert cache["tokens of one such request"] == 2 * 7 * 256 + 100 + 50
    text = plan.make_plan("InternVL2_5-8B", gpu="H100", images=0)
    assert text["one request, no other"][0] == {
        "part": "vision, 0 tiles",
        "floor_s": 0.0,
        "estimate_s": 0.0,
    }


def test_floors_are_below_estimates_and_shares_add_up() -> None:
    report = plan.make_plan("InternVL2_5-38B", gpu="H100", tp_size=2)
    for row in report["one request, no other"]:
        assert row["floor_s"] < row["estimate_s"]
    batch = max(row["batch"] for row in report["load"] if row["within the limits"])
    assert sum(row["share"] for row in report[f"shares at batch {batch}"]) == pytest.approx(1)
    first = {row["part"]: row["estimate_s"] for row in report["one request, no other"]}
    # Public reports: the ViT is about half of the time to the first token.
    assert 0.2 < first["vision, 13 tiles"] / first["first token"] < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "V100"}, "GPU='V100' is unknown; use one of A100-40G, A100-80G"),
        ({"precision": "fp8"}, "there, use one of bf16, fp16, int8, int4, int4_awq, int8_sq"),
        ({"kv_cache": "fp4"}, "KV_CACHE='fp4' is unknown; use one of auto, fp8, int8"),
        ({"max_tiles": 13}, "--max-tiles is 13; this model's pictures have 1 to 12 tiles"),
        ({"images": -1}, "--images is -1; it must be at least 0"),
        ({"output_tokens": 0}, "--output-tokens is 0; it must be at least 1"),
        ({"images": 10}, "such a request has 33472 tokens (130 tiles of 256"),
        ({"limits": {"max_seq_len": 40000}}, "max_seq_len 40000 exceeds"),
        (
            {"images": 2, "limits": {"max_tiles_per_request": 13}},
            "such a request has 26 tiles, and max_tiles_per_request is 13",
        ),
    ],
)
def test_errors_name_what_there_is(changes: dict, message: str) -> None:
    with pytest.raises(BuildFailed, match=re.escape(message)):
        plan.make_plan("InternVL2_5-8B", **{"gpu": "A100-80G", **changes})


def test_unknown_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownModel, match="did you mean InternVL2_5-26B-MPO"):
        plan.make_plan("InternVL2_5-26B-MPOO", gpu="H100")
    with pytest.raises(InvalidCheckpoint, match=r"no config\.json"):
        plan.make_plan(str(tmp_path), gpu="H100")
    assert plan.main(["--model", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: MODEL='nothing' is neither")


def test_validation_lists_every_row_and_the_errors(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(capsys, "--validate")
    assert code == 0
    assert "TensorRT-LLM v0.15" in printed
    report = json.loads(run(capsys, "--validate", "--json")[1])
    assert len(report["rows"]) == 105
    held_out, fitted = report["errors"]
    assert (held_out["rows"], held_out["number"], fitted["number"]) == ("held out", 57, 48)
    assert held_out["median error_share"] <= 0.30
    for row in report["rows"]:
        ratio = row["predicted_tokens_per_s"] / row["published_tokens_per_s"]
        assert row["ratio"] == pytest.approx(ratio)
    assert "median error" in printed


@pytest.mark.parametrize(
    ("key", "value", "title", "text"),
    [
        ("size_bytes", 3 * 2**29, "size", "1.50 GiB"),
        ("floor_s", 0.0123, "floor", "12.3 ms"),
        ("output_tokens_per_s", 1234.5, "output tokens/s", "1,234"),
        ("requests_per_s", 0.256, "requests/s", "0.26"),
        ("share", 0.256, "share", "25.6%"),
        ("parameters", 938193024, "parameters", "938,193,024"),
        ("value", 9.6e-05, "value", "9.6e-05"),
        ("flag", "--workers", "flag", "--workers"),
    ],
)
def test_units_of_cells(key: str, value: object, title: str, text: str) -> None:
    assert (title_of(key), text_of(key, value)) == (title, text)
