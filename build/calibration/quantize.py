"""Standalone language model + calibration inputs -> calibrated TensorRT-LLM 0.21 checkpoint.

    python -m build.calibration.quantize --source DIR --inputs DIR --spec DIR --output DIR
        --precision int4_awq --tp-size 2 [--kv-cache fp8]

Drives ModelOpt 0.31, the one in the pinned container: `mtq.quantize` with the configurations that
TensorRT-LLM 0.21's own `quantize_by_modelopt.py` takes, and `torch_to_tensorrt_llm_checkpoint`.
Differences from that script, each on purpose:
- the model is fed with embeddings, of pictures too: NVIDIA's loop feeds the ids of news articles;
- both families are exported as Llama, which they are but for Qwen2's biases;
- int8 keys and values are measured where fp8 ones are, after RoPE: what the script measures,
  outputs of k_proj and v_proj, ModelOpt 0.31 no longer exports;
- embedding, final norm and head are the model's own, and config.json is this project's: ModelOpt
  pads the vocabulary to a multiple of 64 for AWQ, and virtual token ids start at its true size.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from build.calibration.inputs import FEATURES, INPUT_IDS
from build.calibration.layout import LAYERS, calibrated_shapes, check_layers
from export import CALIBRATED, checkpoint_config
from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import ModelSpec
from internvl_triton.program import program

__all__ = ["input_embeddings", "quantization_config", "quantize"]

DECODER_TYPE = "llama"
KV_CACHE_BITS: dict[str, Any] = {"fp8": (4, 3), "int8": 8}
# NVIDIA's EMPTY_CFG: weights and activations as they are, only keys and values are measured.
_UNQUANTISED: dict[str, Any] = {
    "quant_cfg": {
        "*weight_quantizer": {"enable": False},
        "*input_quantizer": {"enable": False},
        "*lm_head*": {"enable": False},
        "*output_layer*": {"enable": False},
        "default": {"enable": False},
    },
    "algorithm": "max",
}


def quantize(
    source: Path,
    inputs: Path,
    output: Path,
    *,
    spec: ModelSpec,
    precision: str,
    kv_cache: str | None,
    tp_size: int,
) -> Path:
    """Write `output`/config.json and rank0.safetensors ... and return `output`.

    source: what `export_hf_llm(..., as_llama=True)` wrote. inputs: what `write_inputs` wrote.
    precision: calibrated, or any other with a kv_cache. Weights of "int8" and "int4" stay 16-bit in
    the files, as `export_llm` has them, for `trtllm-build` to quantise.

    Raises BuildFailed when what ModelOpt exports is not what TensorRT-LLM 0.21 loads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = checkpoint_config(spec, tp_size=tp_size, precision=precision, kv_cache=kv_cache)
    dtype = getattr(torch, config["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        str(source),
        torch_dtype=dtype,
        device_map="auto" if torch.cuda.is_available() else None,
    )
    model.train(False)
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import torch_to_tensorrt_llm_checkpoint

    samples = sorted(inputs.glob("*.safetensors"))
    if not samples:
        raise BuildFailed(f"{inputs} has no calibration inputs")
    model = mtq.quantize(
        model,
        quantization_config(mtq, precision, kv_cache),
        forward_loop=_forward_loop(samples, vocab_size=spec.llm.vocab_size),
    )
    expected_algos = dict(config["quantization"])
    if precision not in CALIBRATED:
        expected_algos["quant_algo"] = None  # trtllm-build quantises those
    kept = calibrated_shapes(spec.llm, precision=precision, kv_cache=kv_cache, tp_size=tp_size)
    outer = _outer_tensors(model, spec, tp_size, dtype)
    unfinished = output.with_name(output.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(output, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with torch.inference_mode():
        from safetensors.torch import save_file

        _remove_hooks(model)
        exported = torch_to_tensorrt_llm_checkpoint(
            model,
            DECODER_TYPE,
            dtype,
            inference_tensor_parallel=tp_size,
            inference_pipeline_parallel=1,
        )
        ranks = 0
        for (its_config, weights, _), rank_outer in zip(exported, outer, strict=True):
            _check_algos(its_config["quantization"], expected_algos)
            layers = {name: value for name, value in weights.items() if name.startswith(LAYERS)}
            check_layers(
                {
                    name: (str(value.dtype).removeprefix("torch."), tuple(value.shape))
                    for name, value in layers.items()
                },
                spec.llm,
                precision=precision,
                kv_cache=kv_cache,
                tp_size=tp_size,
            )
            tensors = {name: layers[name] for name in kept} | rank_outer
            save_file(tensors, unfinished / f"rank{its_config['rank']}.safetensors")
            ranks += 1
        assert ranks == tp_size, (ranks, tp_size)
    text = json.dumps(config, indent=2) + "\n"
    (unfinished / "config.json").write_text(text, encoding="utf-8")
    os.replace(unfinished, output)
    return output


def quantization_config(mtq: Any, precision: str, kv_cache: str | None) -> dict[str, Any]:
    """ModelOpt's configuration; mtq: the module `modelopt.torch.quantization`."""
    presets = {
        "int8_sq": "INT8_SMOOTHQUANT_CFG",
        "fp8": "FP8_DEFAULT_CFG",
        "int4_awq": "INT4_AWQ_CFG",  # groups of 128
    }
    config: dict[str, Any] = copy.deepcopy(
        getattr(mtq, presets[precision]) if precision in presets else _UNQUANTISED
    )
    if kv_cache is not None:
        config["quant_cfg"]["*[kv]_bmm_quantizer"] = {
            "num_bits": KV_CACHE_BITS[kv_cache],
            "axis": None,
            "enable": True,
        }
    return config


def input_embeddings(embedding: Any, input_ids: Any, features: Any, *, vocab_size: int) -> Any:
    """What the first layer sees: tensor (1, n, hidden) in the embedding's dtype, on its device.

    embedding: the model's nn.Embedding. input_ids (n,) and features (num_visual_tokens, hidden) are
    CPU tensors as in the files of `write_inputs`.
    """
    weight = embedding.weight
    is_visual = input_ids >= vocab_size
    text = embedding(input_ids.masked_fill(is_visual, 0).to(weight.device))
    rows = features[(input_ids[is_visual] - vocab_size).long()]
    text[is_visual.to(text.device)] = rows.to(device=text.device, dtype=text.dtype)
    return text[None]


def _forward_loop(samples: list[Path], *, vocab_size: int) -> Callable[[Any], None]:
    """Runs all samples through the layers; the head is not quantised, so it is left out."""

    def loop(model: Any) -> None:
        import torch
        from safetensors.torch import load_file

        print(f"calibrating with {len(samples)} samples ...", flush=True)
        with torch.no_grad():
            for sample in samples:
                tensors = load_file(str(sample))
                embeddings = input_embeddings(
                    model.get_input_embeddings(),
                    tensors[INPUT_IDS],
                    tensors[FEATURES],
                    vocab_size=vocab_size,
                )
                model.model(inputs_embeds=embeddings, use_cache=False)

    return loop


def _outer_tensors(
    model: Any, spec: ModelSpec, tp_size: int, dtype: Any
) -> Iterator[dict[str, Any]]:
    """For each rank what stands outside the layers, as `rank_shapes` has it: unquantised, the
    vocabulary not padded but for the head's equal parts."""
    import torch

    def own(tensor: Any) -> Any:
        return tensor.detach().to(device="cpu", dtype=dtype).clone()

    head = own(model.get_output_embeddings().weight)
    embedding, norm = own(model.get_input_embeddings().weight), own(model.model.norm.weight)
    rows = spec.llm.padded_vocab_size(tp_size) // tp_size
    head = torch.nn.functional.pad(head, (0, 0, 0, rows * tp_size - len(head)))
    for rank in range(tp_size):
        yield {
            "transformer.vocab_embedding.weight": embedding,
            "transformer.ln_f.weight": norm,
            "lm_head.weight": head[rank * rows : (rank + 1) * rows].clone(),
        }


def _remove_hooks(model: Any) -> None:
    """What spreads the model over GPUs keeps weights that do not fit elsewhere; export reads them
    from the modules (`quantize_by_modelopt.py` does the same)."""
    if getattr(model, "hf_device_map", None):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)


def _check_algos(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("quant_algo", "kv_cache_quant_algo"):
        value = expected[key]
        if found.get(key) != value:
            raise BuildFailed(
                f"ModelOpt exported {key} {found.get(key)}, and {value} was asked for"
            )


@program()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m build.calibration.quantize", description=(__doc__ or "").split("\n")[0]
    )
    for name, text in (
        ("source", "language model for transformers"),
        ("inputs", "calibration inputs"),
        ("spec", "directory with the checkpoint's config.json"),
        ("output", "directory to write; it is replaced as a whole"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--kv-cache", choices=list(KV_CACHE_BITS))
    parser.add_argument("--tp-size", type=int, required=True)
    args = parser.parse_args(argv)
    quantize(
        args.source,
        args.inputs,
        args.output,
        spec=ModelSpec.from_checkpoint(args.spec),
        precision=args.precision,
        kv_cache=args.kv_cache,
        tp_size=args.tp_size,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
