"""Bytes of the fit planner against hand arithmetic, and what it says when they are too many."""

from dataclasses import replace

import pytest

from build.planner.deployment import Deployment
from build.planner.fits import check_fits
from build.planner.gpus import GPUS, gpu_of_device, named_gpu
from build.planner.memory import llm_activation_bytes, vision_activation_bytes
from build.planner.precisions import (
    PRECISIONS,
    checked_kv_cache,
    checked_precision,
    possible_precisions,
)
from build.planner.ways_out import smallest_tp_size, what_would_fit
from build.planner.weights import (
    kv_bytes_per_token,
    parameter_counts,
    rank_weights,
    vision_weight_bytes,
)
from internvl_triton.errors import BuildFailed, InvalidTensorParallel
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import PUBLISHED_MODELS, published_config

GIB = 2**30
TOTALS = {
    "InternVL2_5-1B": 938_193_024,
    "InternVL2_5-2B": 2_205_754_368,
    "InternVL2_5-4B": 3_712_637_952,
    "InternVL2_5-8B": 8_075_365_376,
    "InternVL2_5-26B": 25_514_186_112,
    "InternVL2_5-38B": 38_388_164_992,
    "InternVL2_5-78B": 78_408_318_336,
}
KV_BYTES = dict(
    zip(TOTALS, (12_288, 98_304, 36_864, 131_072, 196_608, 262_144, 327_680), strict=True)
)
SPECS = {name: ModelSpec.from_config(published_config(name)) for name in PUBLISHED_MODELS}


def deployment(
    size: str,
    gpu: str = "A100-80G",
    tp_size: int = 1,
    precision: str = "bf16",
    kv_cache: str = "auto",
    **limits: int,
) -> Deployment:
    spec = SPECS[f"InternVL2_5-{size}"]
    return Deployment.checked(
        spec,
        limits=Limits.for_model(spec, **limits),
        gpu=named_gpu(gpu),
        tp_size=tp_size,
        precision=precision,
        kv_cache=kv_cache,
    )


@pytest.mark.parametrize("name", TOTALS)
def test_parameters_and_kv_bytes_are_the_published_ones(name: str) -> None:
    counts = parameter_counts(SPECS[name])
    assert counts["total"] == TOTALS[name]
    parts = counts["vision tower"] + counts["projector"] + counts["language model"]
    assert parts == counts["total"]
    per_token = kv_bytes_per_token(SPECS[name].llm, tp_size=1, bytes_per_value=2)
    assert per_token == KV_BYTES[name]
    whole = rank_weights(SPECS[name].llm, tp_size=1, precision=PRECISIONS["bf16"])
    assert whole.total_bytes == 2 * counts["language model"]
    assert vision_weight_bytes(SPECS[name]) == 2 * (counts["vision tower"] + counts["projector"])


def test_weights_of_one_of_two_ranks_of_8b() -> None:
    # 16 query and 4 kv heads of 128, 7168 inner channels, half of 92,554 padded rows of lm_head.
    layer = 4096 * ((16 + 2 * 4) * 128) + 4096 * (16 * 128) + 3 * 4096 * 7168
    norms = (2 * 32 + 1) * 4096
    weights = rank_weights(SPECS["InternVL2_5-8B"].llm, tp_size=2, precision=PRECISIONS["bf16"])
    assert weights.layer_parameters == 32 * layer == 3_489_660_928
    assert weights.layer_bytes == 2 * (32 * layer + norms)
    assert weights.head_bytes == 2 * 46_277 * 4096
    assert weights.embedding_bytes == 2 * 92_553 * 4096  # whole on every rank


def test_kv_heads_are_duplicated_when_there_are_more_ranks() -> None:
    llm = SPECS["InternVL2_5-4B"].llm  # 36 layers, 2 kv heads of 128
    sizes = [kv_bytes_per_token(llm, tp_size=tp, bytes_per_value=2) for tp in (1, 2, 4, 8)]
    assert sizes == [36_864, 18_432, 18_432, 18_432]
    assert kv_bytes_per_token(llm, tp_size=1, bytes_per_value=1) == 18_432  # fp8 or int8


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("bf16", 1000 * 512 * 2),
        ("int8", 1000 * 512 + 1000 * 2),  # a 16-bit scale an output
        ("int4", 1000 * 256 + 1000 * 2),
        ("int4_awq", 1000 * 256 + 1000 * 4 * 2 + 512 * 2),  # 4 groups of 128, a factor an input
        ("fp8", 1000 * 512 + 8),
    ],
)
def test_bytes_of_a_quantised_weight(precision: str, expected: int) -> None:
    assert PRECISIONS[precision].linear_bytes(1000, 512) == expected


def test_activations_of_26b() -> None:
    spec = SPECS["InternVL2_5-26B"]
    positions, scores = 26 * 1025, 26 * 25 * 1025**2
    attention = 6 * 3200 * positions + 2 * scores
    assert attention > positions * (3 * 3200 + 2 * 12800)
    assert vision_activation_bytes(spec.vision, 26) == 2 * attention
    # MLP: 3 x 6144 and 3 x 16384 / 2 is more than attention's 2 x (24 + 8) x 128 + 24 x 128.
    expected = 32768 * (3 * 6144 + 3 * 8192) * 2
    assert llm_activation_bytes(spec.llm, 32768, 2) == expected


def test_memory_of_26b_adds_up() -> None:
    memory = deployment("26B", tp_size=2, max_batch_size=4, max_tiles_per_request=13).memory()
    assert memory.parts.prompt_table_bytes == 4 * 13 * 256 * 6144 * 2
    assert memory.parts.logits_bytes == 4 * 4 * 92_554 * 4
    assert memory.kv_tokens == 65_536
    assert memory.kv_cache_bytes == 65_536 * 196_608 // 2
    assert memory.total_bytes == memory.parts.total_bytes + memory.kv_cache_bytes
    assert memory.available_bytes == int(79.1 * GIB)
    free = memory.available_bytes - memory.parts.total_bytes
    assert memory.kv_tokens_that_fit == free // (196_608 // 2)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", SPECS)
def test_every_size_on_every_gpu_is_sane(name: str, gpu: str) -> None:
    one = deployment(name.removeprefix("InternVL2_5-"), gpu)
    totals = [replace(one, tp_size=tp).memory().total_bytes for tp in one.spec.llm.valid_tp_sizes]
    assert totals == sorted(totals, reverse=True)
    smallest = smallest_tp_size(one)
    for tp in one.spec.llm.valid_tp_sizes:
        assert replace(one, tp_size=tp).memory().fits == (smallest is not None and tp >= smallest)
    by_batch = [
        replace(one, limits=replace(one.limits, max_batch_size=size)).memory().total_bytes
        for size in (1, 2, 8, 64)
    ]
    assert by_batch == sorted(by_batch)
    by_precision = [
        replace(one, precision=PRECISIONS[name]).memory().total_bytes
        for name in ("bf16", "int8", "int4_awq", "int4")
    ]
    assert by_precision == sorted(by_precision, reverse=True)
    assert replace(one, kv_cache="int8").memory().kv_cache_bytes * 2 == one.memory().kv_cache_bytes


def test_78b_on_one_a100_is_refused_with_the_smallest_tp_that_fits() -> None:
    spec = SPECS["InternVL2_5-78B"]
    limits = Limits.for_model(spec)
    with pytest.raises(BuildFailed) as refused:
        check_fits(spec, limits=limits, gpu="NVIDIA A100-SXM4-80GB", tp_size=1)
    assert "bf16 with TP=1 needs about 182.8 GiB on each GPU" in str(refused.value)
    assert "A100-80G has 79.1 GiB" in str(refused.value)
    assert "TP=4 (64.4 GiB of 79.1 GiB)" in str(refused.value)
    said = check_fits(spec, limits=limits, gpu="A100-80G", tp_size=4)
    assert said == "Estimated memory: 64.4 GiB of the 79.1 GiB of each A100-80G."


def test_what_would_fit_does_fit() -> None:
    refused = deployment("8B", "A10")
    ways = what_would_fit(refused)
    assert ways[0].startswith("TP=2 (")
    options = ways[1].split(" (")[0].split()
    names = [name.removeprefix("--").replace("-", "_") for name in options[::2]]
    changed = dict(zip(names, map(int, options[1::2]), strict=True))
    smaller = replace(refused, limits=replace(refused.limits, **changed))
    assert smaller.memory().fits
    assert smaller.limits.kv_cache_tokens >= smaller.limits.max_seq_len
    others = ways[-1].removeprefix("GPU=").split(" or ")
    assert "L40S" in others
    assert "L4" not in others


def test_two_changes_when_one_is_not_enough() -> None:
    ways = what_would_fit(deployment("26B", "L4"))
    assert ways[0].startswith("TP=8 --max-seq-len ")
    assert ways[-1].startswith("GPU=A100-80G or A100-80G-PCIe or ")
    expected = "A100-80G TP=4 or A100-80G-PCIe TP=4 or H100-80G TP=4 or H200 TP=2 or L40S TP=8"
    assert what_would_fit(deployment("78B", "A10")) == [f"GPU={expected}"]


def test_nothing_fits() -> None:
    huge = deployment("78B", "A10", max_batch_size=100_000)
    assert what_would_fit(huge) == []
    with pytest.raises(BuildFailed, match="No change that was tried makes it fit"):
        check_fits(huge.spec, limits=huge.limits, gpu="A10", tp_size=1)


def test_weights_that_a_precision_cannot_split() -> None:
    # 29,568 inner channels: 462 x 64, so not at TP 4; 231 x 128, so groups only at TP 1.
    with pytest.raises(
        BuildFailed,
        match=r"TP=4 mlp\.fc\.weight is 7392 x 8192; use TP = 1, 2, or PRECISION bf16, fp16, int8_",
    ):
        deployment("78B", tp_size=4, precision="int8")
    with pytest.raises(BuildFailed, match=r"mlp\.proj\.weight is 8192 x 14784; use TP = 1, or"):
        deployment("78B", tp_size=2, precision="int4_awq")
    assert deployment("78B", "H100", tp_size=4, precision="fp8").fits


def test_an_unknown_machine_is_not_checked_and_that_is_said() -> None:
    spec = SPECS["InternVL2_5-78B"]
    said = check_fits(spec, limits=Limits.for_model(spec), gpu="NVIDIA B200", tp_size=1)
    assert said == "The planner does not know NVIDIA B200: whether the model fits was not checked."


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-80G"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
    ],
)
def test_names_of_nvidia_smi(device: str, name: str | None) -> None:
    found = gpu_of_device(device)
    assert (found and found.name) == name


def test_names_of_gpus() -> None:
    for spelt in ("a100", "A100-80G", "a100_80gb", "A100 80G"):
        assert named_gpu(spelt).name == "A100-80G"
    assert named_gpu("rtx4090").name == "RTX-4090"
    with pytest.raises(BuildFailed, match=r"GPU='V100' is unknown; use one of A100-40G.*4090"):
        named_gpu("V100")


def test_data_sheets_are_consistent() -> None:
    for gpu in GPUS.values():
        assert gpu.bf16_flops < gpu.int8_flops
        assert (gpu.fp8_flops is not None) == (gpu.compute_capability in ("8.9", "9.0"))
        assert gpu.source


def test_precisions_that_a_gpu_cannot_do() -> None:
    a100, l4 = GPUS["A100-80G"], GPUS["L4"]
    with pytest.raises(BuildFailed, match=r"A100-80G has 8\.0; there, use one of bf16, fp16, int8"):
        checked_precision("fp8", a100)
    with pytest.raises(BuildFailed, match=r"KV_CACHE=fp8 needs .*; there, use auto or int8"):
        checked_kv_cache("fp8", a100)
    with pytest.raises(BuildFailed, match=r"PRECISION='fp4' is unknown; use one of bf16,.*int8_sq"):
        checked_precision("fp4", l4)
    with pytest.raises(BuildFailed, match="KV_CACHE='fp4' is unknown; use one of auto, fp8, int8"):
        checked_kv_cache("fp4", l4)
    assert "fp8" not in possible_precisions(a100)
    assert checked_precision("fp8", l4).bits == 8
    assert checked_kv_cache("fp8", l4) == "fp8"


def test_a_tp_size_that_cannot_split_the_model() -> None:
    with pytest.raises(InvalidTensorParallel, match="use TP = 1, 2"):
        deployment("1B", tp_size=4)
