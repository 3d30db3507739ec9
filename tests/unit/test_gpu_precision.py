"""Which PRECISION and KV_CACHE are refused where, and what the refusals offer instead."""

from __future__ import annotations

import pytest

from build.gpu_precision import check_cpu_choice, check_gpu_choice, needs_calibration
from internvl_triton.errors import BuildFailed, InvalidTensorParallel
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config

GPUS = {"A100": "8.0", "L40S": "8.9", "H100": "9.0", "B200": "10.0"}
# TensorRT-LLM 0.21, docs/source/reference/precision.md and tensorrt_llm/builder.py
EVERYWHERE = {"bf16", "fp16", "int4_awq"}
POSSIBLE = {
    "A100": EVERYWHERE | {"int8", "int4", "int8_sq"},
    "L40S": EVERYWHERE | {"int8", "int4", "int8_sq", "fp8"},
    "H100": EVERYWHERE | {"int8", "int4", "int8_sq", "fp8"},
    "B200": EVERYWHERE | {"fp8"},
}
KV = {
    "A100": {"int8"},
    "L40S": {"int8", "fp8"},
    "H100": {"int8", "fp8"},
    "B200": {"fp8"},
}


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_config(published_config(name))


def check(
    precision: str, kv_cache: str | None = None, *, gpu: str = "A100", **more: object
) -> None:
    model = str(more.get("model", "InternVL2_5-8B"))
    check_gpu_choice(
        spec_of(model),
        precision=precision,
        kv_cache=kv_cache,
        tp_size=int(str(more.get("tp_size", 1))),
        gpu=gpu,
        compute_capability=GPUS[gpu],
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    "precision", ["bf16", "fp16", "int8", "int4", "int4_awq", "fp8", "int8_sq"]
)
def test_precisions_of_each_gpu(gpu: str, precision: str) -> None:
    if precision in POSSIBLE[gpu]:
        check(precision, gpu=gpu)
        return
    with pytest.raises(BuildFailed, match=rf"PRECISION={precision} is not for this GPU") as refused:
        check(precision, gpu=gpu)
    offered = str(refused.value).partition("use PRECISION=")[2].split(", ")
    assert set(offered) == POSSIBLE[gpu]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
@pytest.mark.parametrize("precision", ["bf16", "int4_awq", "fp8"])
def test_kv_caches_of_each_gpu(gpu: str, kv_cache: str, precision: str) -> None:
    if precision not in POSSIBLE[gpu]:
        return
    if kv_cache in KV[gpu] and (precision, kv_cache) != ("fp8", "int8"):
        check(precision, kv_cache, gpu=gpu)
        return
    with pytest.raises(BuildFailed, match=f"KV_CACHE={kv_cache} with PRECISION={precision}"):
        check(precision, kv_cache, gpu=gpu)


def test_refusals_say_what_to_use() -> None:
    with pytest.raises(
        BuildFailed,
        match=r"A100 has compute capability 8\.0; fp8 needs 8\.9 or more\); use PRECISION=bf16",
    ):
        check("fp8")
    with pytest.raises(BuildFailed, match=r"use KV_CACHE=int8 or no KV_CACHE$"):
        check("bf16", "fp8")
    with pytest.raises(BuildFailed, match=r"not for fp8 weights; use KV_CACHE=fp8 or no KV_CACHE$"):
        check("fp8", "int8", gpu="H100")
    with pytest.raises(BuildFailed, match="KV_CACHE='fp4' is unknown; use fp8 or int8"):
        check("bf16", "fp4")
    with pytest.raises(BuildFailed, match="PRECISION='int3' is unknown; use one of bf16"):
        check("int3")
    with pytest.raises(BuildFailed, match=r"know no fp32.*use PRECISION=bf16 or fp16"):
        check("fp32")


def test_groups_of_128_inputs_must_fit_into_a_rank() -> None:
    """78B: intermediate 29568 = 231 * 128 goes into one rank only; 4B: 11008 / 8 = 1376."""
    fitting = {}
    for name in PUBLISHED_MODELS:
        fitting[name] = []
        for tp_size in spec_of(name).llm.valid_tp_sizes:
            try:
                check("int4_awq", model=name, tp_size=tp_size)
            except (BuildFailed, InvalidTensorParallel):
                continue
            fitting[name].append(tp_size)
    assert fitting == {
        **{name: [1, 2, 4, 8] for name in PUBLISHED_MODELS},
        "InternVL2_5-1B": [1],  # 14 heads of 64: 448 inputs of attention.dense on two ranks
        "InternVL2_5-4B": [1, 2],
        "InternVL2_5-78B": [1],
    }
    with pytest.raises(
        InvalidTensorParallel,
        match=r"with TP=8 mlp\.fc\.weight is 3696 x 8192; use TP = 1, or PRECISION=bf16, fp16",
    ):
        check("int4_awq", model="InternVL2_5-78B", tp_size=8)
    with pytest.raises(InvalidTensorParallel, match="use TP = 1, or PRECISION=bf16, fp16"):
        check("int4_awq", model="InternVL2_5-1B", tp_size=2)


@pytest.mark.parametrize(
    ("precision", "kv_cache", "refused"),
    [
        ("bf16", None, None),
        ("int8", None, None),
        ("int4", "int8", "KV_CACHE=int8"),
        ("bf16", "fp8", "KV_CACHE=fp8"),
        ("int4_awq", None, "PRECISION=int4_awq"),
        ("fp8", "fp8", "PRECISION=fp8"),
    ],
)
def test_the_cpu_profile_has_what_needs_no_calibration(
    precision: str, kv_cache: str | None, refused: str | None
) -> None:
    assert needs_calibration(precision, kv_cache) == bool(refused)
    if refused is None:
        check_cpu_choice(precision, kv_cache)
        return
    with pytest.raises(BuildFailed, match=f"^{refused} .*PROFILE=cpu has PRECISION=bf16, fp16"):
        check_cpu_choice(precision, kv_cache)
