"""Times of the fit planner against hand arithmetic and published throughput."""

import math
from dataclasses import replace

import pytest

from build.planner import fit
from build.planner.calibration import CALIBRATED, PEAK, Calibration
from build.planner.gpus import GPUS
from build.planner.llm_time import LLMTime
from build.planner.max_load import max_load
from build.planner.other_published import first_tokens, served_internvl
from build.planner.precisions import PRECISIONS
from build.planner.published import (
    CALIBRATION_SHAPES,
    benchmark_batch_size,
    median_error,
    published_rows,
)
from build.planner.vision_time import tile_operations, vision_s
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config

SPECS = {name: ModelSpec.from_config(published_config(name)) for name in PUBLISHED_MODELS}
A100 = GPUS["A100-80G"]


def llm_time(
    size: str,
    *,
    gpu: str = "A100-80G",
    tp_size: int = 1,
    precision: str = "bf16",
    kv_cache: str = "auto",
    calibration: Calibration = PEAK,
) -> LLMTime:
    return LLMTime(
        SPECS[f"InternVL2_5-{size}"].llm,
        gpu=GPUS[gpu],
        tp_size=tp_size,
        precision=PRECISIONS[precision],
        kv_cache=kv_cache,
        calibration=calibration,
    )


LAYERS_8B = 32 * 4096 * (48 * 128 + 32 * 128 + 3 * 14336)  # parameters of the linear weights
HEAD_8B = 92_553 * 4096


def test_prefill_of_8b() -> None:
    time = llm_time("8B").prefill(1000)
    assert time.matmul_s == pytest.approx((2 * LAYERS_8B * 1000 + 2 * HEAD_8B) / 312e12)
    assert time.attention_s == pytest.approx(4 * 32 * 4096 * 1000**2 / 2 / 312e12)
    assert time.all_reduce_s == time.overhead_s == 0
    short = llm_time("8B").prefill(1)  # reading the weights takes longer
    norms = 65 * 4096
    assert short.matmul_s == pytest.approx(2 * (LAYERS_8B + HEAD_8B + norms) / 2039e9)


def test_step_of_8b() -> None:
    norms = 65 * 4096
    single = llm_time("8B").step(1, 500)
    assert single.matmul_s == pytest.approx(2 * (LAYERS_8B + HEAD_8B + norms) / 2039e9)
    assert single.attention_s == pytest.approx(500 * 131_072 / 2039e9)
    full = llm_time("8B").step(1000, 500)  # compute takes longer than reading
    assert full.matmul_s == pytest.approx(2 * (LAYERS_8B + HEAD_8B) * 1000 / 312e12)
    assert full.attention_s == pytest.approx(1000 * single.attention_s)


def test_fp8_multiplies_layers_at_its_own_peak_and_halves_the_cache() -> None:
    time = llm_time("8B", gpu="H100-80G", precision="fp8", kv_cache="fp8")
    expected = 2 * LAYERS_8B * 1000 / 1978.9e12 + 2 * HEAD_8B / 989.4e12
    assert time.prefill(1000).matmul_s == pytest.approx(expected)
    assert time.step(1, 500).attention_s == pytest.approx(500 * 65_536 / 3350e9)


def test_all_reduces_of_78b_at_tp_4() -> None:
    tensor = 16 * 8192 * 2  # a step of 16 sequences
    ring = 2 * 3 / 4 * tensor / 300e9
    assert llm_time("78B", tp_size=4).step(16, 0).all_reduce_s == pytest.approx(160 * ring)
    slow = replace(PEAK, all_reduce_s=1e-4, link={"nvlink": 0.5, "pcie": 1.0})
    time = llm_time("78B", tp_size=4, calibration=slow).step(16, 0)
    assert time.all_reduce_s == pytest.approx(160 * (1e-4 + 2 * ring))


def test_calibration_slows_down_by_its_fractions() -> None:
    half = replace(PEAK, matmul={"ampere bf16": 0.5}, bandwidth=0.25, sequence_s=1e-5)
    peak, slower = llm_time("8B"), llm_time("8B", calibration=half)
    assert slower.prefill(1000).total_s == pytest.approx(2 * peak.prefill(1000).total_s)
    assert slower.step(4, 500).attention_s == pytest.approx(4 * peak.step(4, 500).attention_s)
    assert slower.step(4, 500).overhead_s == pytest.approx(4e-5)


def test_operations_of_a_tile() -> None:
    layer = 2 * 1025 * (4 * 3200**2 + 2 * 3200 * 12800) + 4 * 1025**2 * 3200
    ends = 2 * 1024 * 3 * 14**2 * 3200 + 2 * 256 * (12800 * 6144 + 6144**2)
    assert tile_operations(SPECS["InternVL2_5-26B"]) == 45 * layer + ends
    assert tile_operations(SPECS["InternVL2_5-78B"]) == pytest.approx(12e12, rel=0.02)
    assert tile_operations(SPECS["InternVL2_5-2B"]) == pytest.approx(0.73e12, rel=0.02)


def test_vision_reads_its_weights_at_least_once() -> None:
    spec = SPECS["InternVL2_5-26B"]
    many = vision_s(spec, 13, gpu=A100, calibration=PEAK)
    assert many == pytest.approx(13 * tile_operations(spec) / 312e12)
    assert vision_s(spec, 0.01, gpu=A100, calibration=PEAK) == pytest.approx(
        2 * (5_536_496_000 + 116_429_824) / 2039e9
    )


def test_a_wave_of_requests() -> None:
    llm = llm_time("8B")
    load = max_load(
        llm, batch_size=10, prompt_tokens=1000, output_tokens=100, vision_s_per_request=0.05
    )
    prefill, step = llm.prefill(1000, 10).total_s, llm.step(10, 1050).total_s
    assert load.wave_s == pytest.approx(10 * 0.05 + prefill + 100 * step)
    assert load.output_tokens_per_s == pytest.approx(1000 / load.wave_s)
    assert load.requests_per_s == pytest.approx(10 / load.wave_s)
    assert sum(load.shares().values()) == pytest.approx(1)
    assert load.shares()["vision"] == pytest.approx(0.5 / load.wave_s)


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_more_gpus_batch_and_fewer_bits_are_never_slower_at_peak(name: str) -> None:
    size = name.removeprefix("InternVL2_5-")
    steps = [llm_time(size, tp_size=tp).step(8, 3000) for tp in SPECS[name].llm.valid_tp_sizes]
    reading = [step.matmul_s for step in steps]
    assert reading == sorted(reading, reverse=True)
    bits = [llm_time(size, precision=p).step(1, 3000).total_s for p in ("bf16", "int8", "int4")]
    assert bits == sorted(bits, reverse=True)
    speeds = []
    for batch_size in (1, 2, 4, 8, 16, 64):
        for calibration in (CALIBRATED, PEAK):
            llm = llm_time(size, calibration=calibration)
            load = max_load(llm, batch_size=batch_size, prompt_tokens=3000, output_tokens=128)
            speeds.append(load.output_tokens_per_s)
    assert speeds[::2] == sorted(speeds[::2])
    assert all(estimate < peak for estimate, peak in zip(speeds[::2], speeds[1::2], strict=True))


def test_kv_cache_limits_the_batch_of_the_benchmark() -> None:
    rows = {
        (row.model, row.tp_size, row.column, row.input_tokens, row.output_tokens): row
        for row in published_rows()
    }
    # 2048 + 2048 tokens of 32 x 2 x 1024 x 2 bytes; 90 % of what weights and 2 GB leave.
    row = rows["Llama-3.1-8B", 1, "A100-SXM", 2048, 2048]
    weights = 2 * 8_030_261_248  # the published parameter count of Llama-3.1-8B
    free = int(79.1 * 2**30) - weights - 2e9
    assert benchmark_batch_size(row) == int(free * 0.9 / 131_072 / 4096) == 112
    assert benchmark_batch_size(rows["Llama-3.1-70B", 8, "H100 FP8", 128, 128]) == 2048


def test_published_rows_are_complete() -> None:
    rows = published_rows()
    assert len(rows) == 7 * 5 + 5 * 4 + 5 * 5 + 5 * 5
    assert {(row.model, row.tp_size) for row in rows} == {
        ("Llama-3.1-8B", 1),
        *(("Llama-3.1-70B", tp) for tp in (2, 4, 8)),
    }
    assert all(row.output_tokens_per_s > 0 for row in rows)
    assert rows[0].output_tokens_per_s == 27792
    assert rows[-1].output_tokens_per_s == 243


def test_held_out_rows_are_predicted() -> None:
    held_out = [row for row in published_rows() if row.is_held_out]
    assert len(held_out) >= len(published_rows()) / 2
    assert not {(row.input_tokens, row.output_tokens) for row in held_out} & set(CALIBRATION_SHAPES)
    assert median_error(held_out) <= 0.10  # asked for: 0.30
    for gpu in ("H100-80G", "A100-80G", "A100-80G-PCIe", "L40S"):
        assert median_error([row for row in held_out if row.gpu == gpu]) <= 0.30
    for tp_size in (1, 2, 4, 8):
        assert median_error([row for row in held_out if row.tp_size == tp_size]) <= 0.30


def test_constants_are_those_that_the_fit_finds() -> None:
    fitted = [row for row in published_rows() if not row.is_held_out]
    assert fit.calibration_of(fit.fit(fitted)) == CALIBRATED


def test_numbers_of_other_kinds_are_near() -> None:
    for comparison in (*first_tokens(), *served_internvl()):
        ratio = comparison.predicted / comparison.published
        assert math.isclose(math.log2(ratio), 0, abs_tol=0.8), comparison
        assert comparison.source
