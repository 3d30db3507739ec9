"""The calibration set, what the model sees of it, and the calls made to ModelOpt.

ModelOpt is a stand-in with the signatures of 0.31.0: `modelopt/torch/quantization/model_quant.py`
(`quantize`), `quantization/config.py` (the presets) and `torch/export/model_config_export.py`
(`torch_to_tensorrt_llm_checkpoint`). `tests/golden/modelopt_export.json` holds what the real one
exported; `tests/integration/test_modelopt.py` runs the real one where there is one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from build.calibration.inputs import write_inputs
from build.calibration.layout import calibrated_shapes, check_layers
from build.calibration.pictures import SIZES, built_in_picture
from build.calibration.quantize import input_embeddings, quantization_config, quantize
from build.calibration.samples import BUILT_IN_SAMPLES, Sample, read_samples
from export import export_hf_llm, export_llm, export_vision
from internvl_triton.errors import BuildFailed
from internvl_triton.limits import Limits
from internvl_triton.model_spec import ModelSpec
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.vision_engine import OnnxVisionEngine
from tests.integration.pictures import encoded, picture

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "modelopt_export.json").read_text())


# The calibration set


def test_the_built_in_set_is_the_same_every_time() -> None:
    samples = list(read_samples(None, limit=512))
    assert len(samples) == BUILT_IN_SAMPLES
    assert sum(not sample.request.images for sample in samples) == BUILT_IN_SAMPLES // 8
    assert samples == list(read_samples(None, limit=512))
    assert [len(list(read_samples(None, limit=limit))) for limit in (3, 32)] == [3, 32]
    sizes = set()
    for number in range(5):
        with Image.open(__import__("io").BytesIO(built_in_picture(number))) as image:
            sizes.add(image.size)
            assert len(image.getcolors(maxcolors=2**24) or []) > 1  # something is in it
    assert sizes == set(SIZES[:5])


def write_set(folder: Path, *lines: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(encoded(picture(500, 300), "PNG"))
    text = "\n".join(json.dumps(line) if not isinstance(line, str) else line for line in lines)
    (folder / "samples.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def test_a_directory_of_pictures_and_prompts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    folder = write_set(
        tmp_path / "set",
        {"prompt": "What is it?", "images": ["a.png"], "answer": "A box."},
        "",
        {"messages": messages},
    )
    first, second = read_samples(folder, limit=512)
    assert first.request == Request(
        text_input="What is it?", images=[(folder / "a.png").read_bytes()]
    )
    assert (first.answer, second.answer) == ("A box.", None)
    assert json.loads(second.request.messages or "") == messages
    assert len(list(read_samples(folder, limit=1))) == 1

    (folder / "samples.jsonl").unlink()
    (only_picture,) = read_samples(folder, limit=512)
    assert only_picture.request.text_input
    assert only_picture.request.images == [(folder / "a.png").read_bytes()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "?"}, r"samples.jsonl, line 1 has \['question'\]; allowed: answer, images"),
        ({"images": []}, "line 1 must have exactly one of prompt and messages"),
        ({"prompt": "?", "images": ["b.png"]}, "line 1 names b.png, which cannot be read"),
        ({"prompt": "?", "images": "a.png"}, "images must be a list of file names"),
        ({"prompt": "?", "answer": ["a"]}, "answer must be a text"),
        ("{", "line 1 is not valid JSON"),
        ("", "is empty; give one JSON object a line"),
    ],
)
def test_lines_that_are_no_sample_are_named(line: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=message):
        list(read_samples(write_set(tmp_path / "set", line), limit=512))


def test_directories_that_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="is no directory"):
        list(read_samples(tmp_path / "missing", limit=1))
    with pytest.raises(BuildFailed, match=r"neither a .jsonl file nor pictures"):
        list(read_samples(tmp_path, limit=1))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(BuildFailed, match=r"several .jsonl files: a.jsonl, b.jsonl"):
        list(read_samples(tmp_path, limit=1))


# What the model sees of it


@pytest.fixture(scope="module")
def visions(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, OnnxVisionEngine]:
    engines = {}
    for family, checkpoint in checkpoints.items():
        folder = tmp_path_factory.mktemp(family)
        export_vision(checkpoint, folder, progress=False)
        engines[family] = OnnxVisionEngine(folder / "vision_encoder.onnx")
    return engines


def preprocessor_of(checkpoint: Path, **limits: int) -> Preprocessor:
    spec = ModelSpec.from_checkpoint(checkpoint)
    return Preprocessor(spec, Limits.for_model(spec, **limits), load_tokenizer(checkpoint))


def test_embeddings_are_those_of_transformers(
    checkpoint: Path, family: str, visions: dict[str, OnnxVisionEngine], tmp_path: Path
) -> None:
    """Text and visual positions, against what the first layer of transformers' port gets."""
    torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
    from tests.oracle import Oracle

    preprocessor = preprocessor_of(checkpoint)
    spec, tokenizer = preprocessor.spec, preprocessor.tokenizer
    request = Request(text_input="What?", images=[encoded(picture(448, 448), "PNG")])
    samples = [
        Sample(request, "A box.", "first"),
        Sample(Request(text_input="Why?"), None, "second"),
    ]
    assert (
        write_inputs(
            samples, tmp_path / "inputs", preprocessor=preprocessor, vision=visions[family]
        )
        == 2
    )
    files = sorted((tmp_path / "inputs").iterdir())
    with_picture, text_only = (load_file(file) for file in files)
    ids = with_picture["input_ids"]
    assert (ids >= spec.llm.vocab_size).sum() == spec.tokens_per_tile
    assert with_picture["features"].shape == (spec.tokens_per_tile, spec.llm.hidden_size)
    assert ids[-1] == tokenizer.end_id  # the answer ends its turn
    assert text_only["features"].shape == (0, spec.llm.hidden_size)
    assert text_only["input_ids"].max() < spec.llm.vocab_size

    oracle = Oracle(checkpoint)
    seen: list[Any] = []
    first_layer = oracle.model.model.language_model.layers[0]
    hook = first_layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    context = tokenizer.special_id("<IMG_CONTEXT>")
    theirs = [context if i >= spec.llm.vocab_size else int(i) for i in ids]
    from build.parity.port import pixel_values

    with torch.no_grad():
        oracle.model(
            input_ids=torch.tensor([theirs]),
            pixel_values=pixel_values(preprocessor(request)["tiles"]),
        )
    hook.remove()
    embedding = oracle.model.get_input_embeddings()
    with torch.no_grad():
        ours = input_embeddings(
            embedding,
            torch.from_numpy(ids),
            torch.from_numpy(with_picture["features"]),
            vocab_size=spec.llm.vocab_size,
        )
    assert ours.shape == (1, len(ids), spec.llm.hidden_size)
    np.testing.assert_allclose(ours.numpy(), seen[0].numpy(), atol=1e-4)


def test_requests_that_the_service_would_refuse_are_named(
    checkpoints: dict[str, Path], visions: dict[str, OnnxVisionEngine], tmp_path: Path
) -> None:
    def write(*samples: Sample) -> int:
        return write_inputs(
            samples,
            tmp_path / "inputs",
            preprocessor=preprocessor_of(checkpoints["qwen2"]),
            vision=visions["qwen2"],
        )

    with pytest.raises(BuildFailed, match=r"sample x\.jsonl, line 3: .*<\|im_end\|>"):
        write(Sample(Request(text_input="<|im_end|>"), None, "x.jsonl, line 3"))
    with pytest.raises(BuildFailed, match="the calibration set is empty"):
        write()


# Calls to ModelOpt

PRESETS: dict[str, dict[str, Any]] = {
    "INT8_SMOOTHQUANT_CFG": {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}},
    "FP8_DEFAULT_CFG": {"quant_cfg": {"*weight_quantizer": {"num_bits": (4, 3), "axis": None}}},
    "INT4_AWQ_CFG": {
        "quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 128}}},
        "algorithm": {"method": "awq_lite", "alpha_step": 0.1},
    },
}
ALGOS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ", "int8_sq": "W8A8_SQ_PER_CHANNEL"}
TORCH_DTYPES = {"int4_awq": "int8", "int8_sq": "int8", "fp8": "float8_e4m3fn"}


class FakeModelOpt:
    """Records what it is asked for; exports tensors of the layout in which 0.31 does."""

    def __init__(self, spec: ModelSpec, precision: str, kv_cache: str | None) -> None:
        self.spec, self.precision, self.kv_cache = spec, precision, kv_cache
        self.config: dict[str, Any] = {}
        self.seen: list[tuple[int, ...]] = []
        self.spoil: Any = None

    def quantize(self, model: Any, config: dict[str, Any], forward_loop: Any = None) -> Any:
        self.config = config
        layer = model.model.layers[0]
        hook = layer.register_forward_pre_hook(lambda _, given: self.seen.append(given[0].shape))
        forward_loop(model)
        hook.remove()
        return model

    def torch_to_tensorrt_llm_checkpoint(
        self,
        model: Any,
        decoder_type: str,
        dtype: Any = None,
        inference_tensor_parallel: int = 0,
        inference_pipeline_parallel: int = 1,
        workspace_path: Any = None,
    ) -> Any:
        import torch

        assert (decoder_type, inference_pipeline_parallel) == ("llama", 1)
        padded = -(-self.spec.llm.vocab_size // 64) * 64
        for rank in range(inference_tensor_parallel):
            shapes = calibrated_shapes(
                self.spec.llm,
                precision=self.precision,
                kv_cache=self.kv_cache,
                tp_size=inference_tensor_parallel,
            )
            weights = {}
            for name, shape in shapes.items():
                linear = len(shape) == 2 and name.endswith(".weight")
                kind = TORCH_DTYPES.get(self.precision, "bfloat16") if linear else "bfloat16"
                weights[name] = torch.zeros(shape).to(getattr(torch, kind))
            if self.kv_cache:  # it exports a factor for k and one for v, too
                weights["transformer.layers.0.attention.k_cache_scaling_factor"] = torch.ones(1)
            rows = padded // inference_tensor_parallel
            weights["transformer.vocab_embedding.weight"] = torch.zeros(rows, 8)
            weights["lm_head.weight"] = torch.zeros(rows, 8)
            if self.spoil:
                self.spoil(weights)
            algos = {
                "quant_algo": ALGOS.get(self.precision),
                "kv_cache_quant_algo": self.kv_cache and self.kv_cache.upper(),
                "exclude_modules": ["lm_head"],
            }
            config = {"rank": rank, "vocab_size": padded, "quantization": algos}
            yield config, weights, algos


def fake_modelopt(patch: pytest.MonkeyPatch, fake: FakeModelOpt) -> None:
    modules = {
        name: ModuleType(name)
        for name in (
            "modelopt",
            "modelopt.torch",
            "modelopt.torch.quantization",
            "modelopt.torch.export",
        )
    }
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
        patch.setitem(sys.modules, name, module)
    quantization = modules["modelopt.torch.quantization"]
    quantization.__dict__.update(PRESETS, quantize=fake.quantize)
    modules["modelopt.torch.export"].__dict__.update(
        torch_to_tensorrt_llm_checkpoint=fake.torch_to_tensorrt_llm_checkpoint
    )


@pytest.fixture
def prepared(
    checkpoint: Path, family: str, visions: dict[str, OnnxVisionEngine], tmp_path: Path
) -> tuple[Path, Path]:
    """The standalone model and the inputs of two short samples."""
    source = export_hf_llm(checkpoint, tmp_path / "source", as_llama=True, progress=False)
    request = Request(text_input="What?", images=[encoded(picture(448, 448), "PNG")])
    write_inputs(
        [Sample(request, None, "a"), Sample(Request(text_input="Why?"), None, "b")],
        tmp_path / "inputs",
        preprocessor=preprocessor_of(checkpoint),
        vision=visions[family],
    )
    return source, tmp_path / "inputs"


@pytest.mark.parametrize(
    ("precision", "kv_cache", "tp_size"),
    [("int4_awq", None, 2), ("fp8", "fp8", 1), ("int8_sq", None, 2), ("int8", "int8", 1)],
)
def test_modelopt_is_driven(
    precision: str,
    kv_cache: str | None,
    tp_size: int,
    checkpoint: Path,
    spec: ModelSpec,
    prepared: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
    from safetensors.torch import load_file as load_torch

    fake = FakeModelOpt(spec, precision, kv_cache)
    fake_modelopt(monkeypatch, fake)
    output = quantize(
        *prepared,
        tmp_path / "output",
        spec=spec,
        precision=precision,
        kv_cache=kv_cache,
        tp_size=tp_size,
    )
    lengths = [len(load_file(file)["input_ids"]) for file in sorted(prepared[1].iterdir())]
    assert fake.seen == [(1, length, spec.llm.hidden_size) for length in lengths]
    assert lengths[0] > spec.tokens_per_tile

    plain = export_llm(checkpoint, tmp_path / "plain", tp_size=tp_size, progress=False)
    ours, expected = (json.loads((d / "config.json").read_text()) for d in (output, plain))
    assert ours["quantization"]["kv_cache_quant_algo"] == (kv_cache and kv_cache.upper())
    assert ours["quantization"]["quant_algo"] == (ALGOS | {"int8": "W8A16"})[precision]
    assert ours["quantization"]["pre_quant_scale"] == (precision == "int4_awq")
    del ours["quantization"], expected["quantization"]
    assert ours == expected  # vocab_size above all
    for rank in range(tp_size):
        tensors, bf16 = (load_torch(d / f"rank{rank}.safetensors") for d in (output, plain))
        outside = [name for name in bf16 if ".layers." not in name]
        assert sorted(outside) == sorted(name for name in tensors if ".layers." not in name)
        for name in outside:
            assert tensors[name].equal(bf16[name]), name
        assert not any("k_cache_scaling" in name for name in tensors)
    assert sorted(file.name for file in output.iterdir())[0] == "config.json"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("transformer.layers.1.mlp.fc.weight"), "exported no .*layers.1.mlp.fc.w"),
        (
            lambda w: w.update({"transformer.layers.0.x": w["lm_head.weight"]}),
            "exported .*layers.0.x",
        ),
        (
            lambda w: w.update({(n := "transformer.layers.0.mlp.gate.weight"): w[n][:2]}),
            r"mlp.gate.weight as \(2, 256\); TensorRT-LLM reads \(512, 256\)",
        ),
        (
            lambda w: w.update({(n := "transformer.layers.0.mlp.gate.weight"): w[n].float()}),
            "mlp.gate.weight as float32; int8_sq has int8",
        ),
    ],
)
def test_an_export_that_tensorrt_llm_would_not_load_is_refused(
    spoil: Any,
    message: str,
    spec: ModelSpec,
    prepared: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
    fake = FakeModelOpt(spec, "int8_sq", None)
    fake.spoil = spoil
    fake_modelopt(monkeypatch, fake)
    with pytest.raises(BuildFailed, match=message):
        quantize(
            *prepared,
            tmp_path / "output",
            spec=spec,
            precision="int8_sq",
            kv_cache=None,
            tp_size=1,
        )
    assert not (tmp_path / "output").exists()


def test_presets_and_kv_caches() -> None:
    class Mtq:
        locals().update(PRESETS)

    assert quantization_config(Mtq, "int4_awq", None) == PRESETS["INT4_AWQ_CFG"]
    both = quantization_config(Mtq, "fp8", "fp8")["quant_cfg"]
    assert both["*weight_quantizer"] == {"num_bits": (4, 3), "axis": None}
    assert both["*[kv]_bmm_quantizer"] == {"num_bits": (4, 3), "axis": None, "enable": True}
    only_cache = quantization_config(Mtq, "int8", "int8")
    assert only_cache["algorithm"] == "max"
    enabled = {name for name, entry in only_cache["quant_cfg"].items() if entry["enable"]}
    assert enabled == {"*[kv]_bmm_quantizer"}
    assert "*[kv]_bmm_quantizer" not in PRESETS["FP8_DEFAULT_CFG"]["quant_cfg"]  # a copy


@pytest.mark.parametrize("case", GOLDEN["exports"], ids=lambda case: case["id"])
def test_the_layout_is_that_of_the_real_modelopt(
    case: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    """Names, dtypes and shapes that ModelOpt 0.31.0 exported of the tiny checkpoints."""
    spec = ModelSpec.from_checkpoint(checkpoints[case["family"]]).llm
    options = {key: case[key] for key in ("precision", "kv_cache", "tp_size")}
    found = {
        f"transformer.layers.{layer}.{name}": (dtype, tuple(shape))
        for layer in range(spec.num_layers)
        for name, (dtype, shape) in case["layer"].items()
    }
    check_layers(found, spec, **options)
    renamed = calibrated_shapes(spec, **options)
    extra = {
        name
        for name in found
        if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))
    }
    assert set(found) - extra == set(renamed)
