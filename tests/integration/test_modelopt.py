"""The real ModelOpt 0.31 on the CPU: its export, dequantised, is what this project converts.

Opt-in: INTERNVL_MODELOPT_PYTHON names a Python that has nvidia-modelopt 0.31.0, torch, transformers
4.51, accelerate and what this project imports (numpy, safetensors, Pillow, ml_dtypes, tqdm,
sentencepiece, tokenizers). It needs no GPU, and minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from build.calibration.inputs import write_inputs
from build.calibration.samples import Sample
from export import export_hf_llm, export_llm
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.tokenizer import load_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

ROOT = Path(__file__).parents[2]
MODELOPT_PYTHON = os.environ.get("INTERNVL_MODELOPT_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        MODELOPT_PYTHON is None, reason="INTERNVL_MODELOPT_PYTHON names no Python with ModelOpt"
    ),
]
# Relative error of a dequantised matrix: uniform rounding to steps of max/127 of a row, to a
# mantissa of 3 bits, and to steps of max/7 of a group.
TOLERANCE = {"int8_sq": 0.02, "fp8": 0.05, "int4_awq": 0.15}


class NoVision:
    """Text-only samples need no vision engine."""

    def zeros(self, num_rows: int):
        import numpy as np

        return np.zeros((num_rows, 256), np.float32)


def dequantised(tensors, prefix: str, precision: str):
    weight, scale = (tensors[prefix + name] for name in ("weight", "weights_scaling_factor"))
    if precision == "fp8":
        return weight.float() * scale
    if precision == "int8_sq":
        values = weight.float() * scale[:, None]
    else:
        packed = weight.view(torch.uint8)
        values = torch.empty(2 * len(packed), packed.shape[1])
        for half in (0, 1):  # two outputs a byte, the even one in the low four bits
            four_bits = ((packed >> 4 * half) & 15).float()
            values[half::2] = torch.where(four_bits > 7, four_bits - 16, four_bits)
        values = values * scale.float().repeat_interleave(128, 1)
    # Inputs are multiplied by this factor before the product.
    return values * tensors[prefix + "prequant_scaling_factor"].float()


@pytest.mark.parametrize(
    ("precision", "kv_cache", "tp_size"),
    [("int8_sq", "int8", 2), ("fp8", "fp8", 2), ("int4_awq", None, 2)],
)
def test_what_modelopt_exports_is_what_is_converted(
    precision: str, kv_cache: str | None, tp_size: int, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    spec = ModelSpec.from_checkpoint(checkpoint)
    write_inputs(
        [Sample(Request(text_input="Why?"), None, "text")],
        tmp_path / "inputs",
        preprocessor=Preprocessor(spec, Limits.for_model(spec), load_tokenizer(checkpoint)),
        vision=NoVision(),  # type: ignore[arg-type]
    )
    source = export_hf_llm(checkpoint, tmp_path / "source", as_llama=True, progress=False)
    plain = export_llm(checkpoint, tmp_path / "plain", tp_size=tp_size, progress=False)
    output = tmp_path / "output"
    command = [
        *(str(MODELOPT_PYTHON), str(Path(__file__).with_name("modelopt_on_cpu.py"))),
        *(f"--source={source}", f"--inputs={tmp_path / 'inputs'}", f"--spec={checkpoint}"),
        *(f"--output={output}", f"--precision={precision}", f"--tp-size={tp_size}"),
        *([f"--kv-cache={kv_cache}"] if kv_cache else []),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((output / "config.json").read_text())
    assert config["vocab_size"] == spec.llm.vocab_size
    for rank in range(tp_size):
        ours, bf16 = (load_file(folder / f"rank{rank}.safetensors") for folder in (output, plain))
        for name, weight in bf16.items():
            if ".layers." in name and weight.dim() == 2:
                found = dequantised(ours, name.removesuffix("weight"), precision)
                error = (found - weight.float()).norm() / weight.float().norm()
                assert error < TOLERANCE[precision], (name, float(error))
            elif "norm" not in name or precision == "fp8":
                assert ours[name].equal(weight), name
        caches = [name for name in ours if name.endswith("kv_cache_scaling_factor")]
        assert len(caches) == (spec.llm.num_layers if kv_cache else 0)
