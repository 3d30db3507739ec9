"""`make verify`: artefacts that are right pass, and every known way of being wrong fails.

The language model's answers come from its engine in this process; the running service is behind
`tests/integration/test_verify_service.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from build.engines import build_engines
from build.parity.certificate import Certificate
from build.parity.engine_outputs import (
    ANSWER_TOKENS,
    EngineOutput,
    ask_with,
    load_outputs,
    run_engines,
    save_outputs,
)
from build.parity.page import render_page
from build.parity.questions import Question, verification_questions
from build.verify import certify, main, verify
from export import export_vision
from internvl_triton import preprocessing
from internvl_triton import tensor_contract as contract
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.client import Client
from internvl_triton.cpu_llm.transformer import Segment, Transformer
from internvl_triton.errors import ArtifactMismatch, BuildFailed
from internvl_triton.fake_transport import FakeTransport, fake_response
from internvl_triton.preprocessing import Preprocessor, Request
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.tensorrt_vision_engine import TensorrtVisionEngine
from internvl_triton.tokenizer import load_tokenizer
from internvl_triton.vision_engine import OnnxVisionEngine
from tests.unit.gpu_fakes import NVIDIA_SMI, write_program

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

ALL = ["tile grid", "pixels", "token ids", "visual features", "logits", "greedy agreement"]
TEXT, ONE_TILE, LARGE, THREE = verification_questions()
SHORT = [TEXT, ONE_TILE]


def failed(certificate: Certificate) -> list[str]:
    assert certificate.passed == all(check.passed for check in certificate.checks)
    return [check.name for check in certificate.checks if not check.passed]


@dataclass
class Built:
    checkpoint: Path
    artifacts: Artifacts
    llm: LLMBuild

    def answers(self, questions: Sequence[Question]) -> list[list[int]]:
        """Greedy answers of the CPU engine, in this process."""
        tokenizer = load_tokenizer(self.artifacts.tokenizer_dir)
        preprocess = Preprocessor(self.artifacts.spec(), self.artifacts.limits(), tokenizer)
        vision = OnnxVisionEngine(self.artifacts.vision_onnx)
        model = Transformer.from_checkpoint(
            self.artifacts.llm_checkpoint(self.llm), max_seq_len=8192
        )
        answers = []
        for question in questions:
            text = question.prompt if isinstance(question.prompt, str) else None
            messages = None if text else json.dumps(question.prompt)
            tensors = preprocess(Request(text, messages, question.pictures))
            tiles = tensors[contract.TILES.name]
            table = vision.encode(tiles) if len(tiles) else None
            caches = model.new_caches()
            segment = Segment(tensors[contract.INPUT_IDS.name][0], caches, table)
            answer: list[int] = []
            while len(answer) < ANSWER_TOKENS and tokenizer.end_id not in answer:
                answer.append(int(model.logits(model.forward([segment])[-1:]).argmax()))
                segment = Segment(np.array(answer[-1:], np.int32), caches)
            answers.append(answer)
        return answers

    def outputs(self, questions: Sequence[Question] = SHORT) -> list[EngineOutput]:
        return run_engines(self.artifacts, self.llm, "cpu", questions, self.answers)

    def certificate(self, questions: Sequence[Question] = SHORT) -> Certificate:
        return self.judge(self.outputs(questions), questions)

    def judge(
        self, outputs: Sequence[EngineOutput], questions: Sequence[Question] = SHORT
    ) -> Certificate:
        return certify(self.artifacts, self.llm, "cpu", self.checkpoint, questions, outputs)


def build(root: Path, family: str, vit: str, precision: str = "bf16") -> Built:
    checkpoint = write_random_checkpoint(root / "tiny", tiny_config(family, vit))  # type: ignore[arg-type]
    artifacts = build_engines(
        str(checkpoint),
        profile="cpu",
        tp_size=2,
        precision=precision,
        artifacts_dir=root / "artifacts",
        progress=False,
    )
    return Built(checkpoint, artifacts, LLMBuild(precision, 2))


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("verify"), "internlm2", "300m")


@pytest.fixture(scope="module")
def outputs(built_once: Built) -> list[EngineOutput]:
    return built_once.outputs()


@pytest.fixture
def built(built_once: Built, tmp_path: Path) -> Built:
    """A copy to spoil."""
    root = shutil.copytree(built_once.artifacts.root, tmp_path / "artifacts" / "tiny")
    return replace(built_once, artifacts=Artifacts(root))


# --- right artefacts ----------------------------------------------------------------------------


def test_right_artefacts_pass_every_check(tmp_path: Path) -> None:
    built = build(tmp_path, "qwen2", "6b")
    certificate = built.certificate([TEXT, THREE])
    assert [check.name for check in certificate.checks] == ALL
    assert failed(certificate) == []
    measured = {check.name: check for check in certificate.checks}
    assert measured["pixels"].of == "8 tiles"  # 2 x 1 and 1 x 3 with their thumbnails, and 1
    assert 0 < measured["visual features"].measured < 1e-5
    assert 0 < measured["logits"].measured < 1e-3


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_quantised_weights_are_compared_with_their_own_values(
    precision: str, tmp_path: Path
) -> None:
    certificate = build(tmp_path, "internlm2", "300m", precision).certificate([TEXT])
    assert failed(certificate) == []
    facts = certificate.information
    if precision == "fp16":
        assert list(facts) == ["tokens chosen exactly like the reference"]
        return
    assert "dequantised for TP 2" in certificate.reference
    rms = float(facts["logits: rms difference that quantisation makes"])
    low, high = {"int8": (0.005, 0.2), "int4": (0.2, 4.0)}[precision]
    assert low < rms < high  # far above the limit of the check: the same weights are compared


def test_what_a_certificate_holds(built_once: Built, outputs: list[EngineOutput]) -> None:
    certificate = built_once.judge(outputs)
    values = json.loads(json.dumps(certificate.to_json(), allow_nan=False))
    assert values["passed"] is True
    assert values["certificate_version"] == 1
    assert values["checkpoint_sha256"] == built_once.artifacts.manifest().checkpoint_sha256
    assert values["manifest"]["steps"].keys() >= {"vision", "llm bf16-tp2"}
    assert (values["profile"], values["precision"], values["tp_size"]) == ("cpu", "bf16", 2)
    assert {"torch", "transformers", "onnxruntime", "numpy"} <= values["versions"].keys()
    for check in values["checks"]:
        assert check["measured"] <= check["limit"]
    page = render_page(certificate)
    assert page.count("<tr><td>") >= len(ALL)
    assert "failed</span>" not in page
    for forbidden in ("src=", "href=", "@import", "url("):
        assert forbidden not in page  # it needs no other file
    assert str(built_once.checkpoint) not in page + json.dumps(values)


# --- wrong artefacts ----------------------------------------------------------------------------


def edit_ranks(built: Built, change: Callable[[list[dict[str, np.ndarray]]], None]) -> None:
    files = [built.artifacts.llm_checkpoint(built.llm) / f"rank{r}.safetensors" for r in range(2)]
    ranks = [load_file(file) for file in files]
    change(ranks)
    for file, tensors in zip(files, ranks, strict=True):
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file)


def heads_on_the_wrong_rank(built: Built) -> None:
    def swap(ranks: list[dict[str, np.ndarray]]) -> None:
        name = "transformer.layers.1.attention.qkv.weight"
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]

    edit_ranks(built, swap)


def vocabulary_on_the_wrong_rank(built: Built) -> None:
    def swap(ranks: list[dict[str, np.ndarray]]) -> None:
        name = "lm_head.weight"
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]

    edit_ranks(built, swap)


def one_wrong_number(built: Built) -> None:
    def change(ranks: list[dict[str, np.ndarray]]) -> None:
        ranks[0]["transformer.ln_f.weight"][3] *= 4
        ranks[1]["transformer.ln_f.weight"][3] *= 4

    edit_ranks(built, change)


def red_and_blue_swapped(built: Built) -> None:
    spoilt = Path(shutil.copytree(built.checkpoint, built.artifacts.root.parent / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, ::-1])
    save_file(tensors, spoilt / "model.safetensors")
    export_vision(spoilt, built.artifacts.vision_dir, progress=False)


def another_tile_limit(built: Built) -> None:
    path = built.artifacts.tokenizer_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_dynamic_patch": 6}))


def another_vocabulary(built: Built) -> None:
    import sentencepiece.sentencepiece_model_pb2 as sp

    path = built.artifacts.tokenizer_dir / "tokenizer.model"
    model = sp.ModelProto.FromString(path.read_bytes())
    by_piece = {piece.piece: piece for piece in model.pieces}
    by_piece["s"].piece, by_piece["e"].piece = "e", "s"
    path.write_bytes(model.SerializeToString())


@pytest.mark.filterwarnings("ignore:Protobuf gencode")
@pytest.mark.parametrize(
    ("spoil", "found_by"),
    [
        (heads_on_the_wrong_rank, ["logits", "greedy agreement"]),
        (vocabulary_on_the_wrong_rank, ["logits", "greedy agreement"]),
        (one_wrong_number, ["logits"]),
        (red_and_blue_swapped, ["visual features", "logits", "greedy agreement"]),
        (another_tile_limit, ["tile grid"]),
        (another_vocabulary, ["token ids"]),
    ],
)
def test_what_is_wrong_is_found(
    built: Built, spoil: Callable[[Built], None], found_by: list[str]
) -> None:
    spoil(built)
    assert set(found_by) <= set(failed(built.certificate()))
    earlier = ALL[: ALL.index(found_by[0])]
    assert not set(earlier) & set(failed(built.certificate()))


def test_wrong_pixels_are_found(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    tile_image = preprocessing.tile_image
    mirrored = lambda *args, **options: tile_image(*args, **options)[:, :, ::-1]  # noqa: E731
    monkeypatch.setattr(preprocessing, "tile_image", mirrored)
    assert failed(built.certificate([ONE_TILE]))[0] == "pixels"


@pytest.mark.parametrize(
    ("field", "change", "found_by"),
    [
        # The last token is the only one that nothing comes after.
        ("answer", lambda ids: np.append(ids[:-1], (ids[-1] + 7) % 1283), "greedy agreement"),
        ("logits", lambda logits: logits * np.nan, "logits"),
        ("features", lambda rows: rows[::-1], "visual features"),
        ("features", lambda rows: rows[:-1], "visual features"),
        ("input_ids", lambda ids: ids[:-1], "token ids"),
        ("input_ids", lambda ids: np.where(ids >= 1283, ids + 1, ids), "token ids"),
        ("tiles", lambda tiles: tiles[:0], "pixels"),
    ],
)
def test_each_check_looks_at_its_own_output(
    built_once: Built, outputs: list[EngineOutput], field: str, change, found_by: str
) -> None:
    spoilt = replace(outputs[1], **{field: change(getattr(outputs[1], field))})
    certificate = built_once.judge([outputs[0], spoilt])
    assert failed(certificate) == [found_by]
    assert "failed</span>" in render_page(certificate)
    json.dumps(certificate.to_json(), allow_nan=False)


# --- the gpu profile, with stand-ins for what only a GPU machine has ----------------------------


class Bfloat16OnnxDevice:
    """A `DeviceEngine` that computes with ONNX Runtime and rounds like the real one."""

    max_tiles = 5
    device = torch.device("cpu")

    def __init__(self, onnx_path: Path) -> None:
        self._engine = OnnxVisionEngine(onnx_path)
        self.tile_size = self._engine.tile_size
        self.tokens_per_tile = self._engine.tokens_per_tile
        self.hidden_size = self._engine.hidden_size

    def start(self, tiles: np.ndarray) -> torch.Tensor:
        assert 1 <= len(tiles) <= self.max_tiles
        return torch.from_numpy(self._engine.encode(tiles)).bfloat16()

    def wait(self) -> None:
        pass


def test_gpu_engines_through_their_runtime_classes(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, int, str]] = []

    def load(plan: Path, *, num_gpus: int, table_dtype: str) -> TensorrtVisionEngine:
        asked.append((plan, num_gpus, table_dtype))
        devices = [Bfloat16OnnxDevice(built.artifacts.vision_onnx) for _ in range(num_gpus)]
        return TensorrtVisionEngine(devices, table_dtype=table_dtype)

    monkeypatch.setattr(TensorrtVisionEngine, "load", load)
    questions = SHORT
    ran = run_engines(built.artifacts, built.llm, "gpu", questions, built.answers)
    assert asked == [(built.artifacts.vision_plan, 2, "BF16")]
    save_outputs(tmp_path / "outputs.npz", ran)
    outputs = load_outputs(tmp_path / "outputs.npz")
    certificate = certify(built.artifacts, built.llm, "gpu", built.checkpoint, questions, outputs)
    assert failed(certificate) == []
    checks = {check.name: check for check in certificate.checks}
    assert "logits" not in checks  # NVIDIA's engine gives none
    assert 1e-4 < checks["visual features"].measured < checks["visual features"].limit

    swapped = [replace(output, features=output.features[::-1]) for output in outputs]
    certificate = certify(built.artifacts, built.llm, "gpu", built.checkpoint, questions, swapped)
    assert failed(certificate) == ["visual features"]
    noise = [replace(o, answer=np.append(o.answer[:-1], (o.answer[-1] + 7) % 1283)) for o in ran]
    certificate = certify(built.artifacts, built.llm, "gpu", built.checkpoint, questions, noise)
    assert failed(certificate) == ["greedy agreement"]


def test_a_service_is_asked_greedily_and_its_ends_are_kept() -> None:
    whole = fake_response(b"x", range(ANSWER_TOKENS))
    for response, expected in (
        (whole, list(range(ANSWER_TOKENS))),
        (fake_response(b"x", [4, 5]), [4, 5, 99]),
    ):
        transport = FakeTransport([response])
        with Client(transport=transport) as client:
            assert ask_with(client, 99, [THREE]) == [expected]
        ((_, tensors),) = transport.requests
        sampling = json.loads(tensors[contract.SAMPLING_PARAMETERS.name][0])
        assert sampling == {"max_tokens": ANSWER_TOKENS, "temperature": 0}
        assert len(tensors[contract.IMAGES.name]) == 3


DOCKER = """
import json, os, shutil, sys
with open(os.environ["FAKE_DOCKER_CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
command = sys.argv[1]
if command == "version":
    print("28.3.0")
elif "--list-gpus" in sys.argv:
    print("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0abc)")
elif command == "run":
    if not os.environ.get("FAKE_OUTPUTS"):
        sys.exit(3)
    (output,) = [text for text in sys.argv if text.startswith("--output=")]
    shutil.copy(os.environ["FAKE_OUTPUTS"], output.removeprefix("--output="))
"""


def test_on_a_gpu_host_the_engines_run_in_the_container(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("build.verify.verification_questions", lambda: SHORT)
    save_outputs(tmp_path / "outputs.npz", built.outputs(SHORT))
    write_program(tmp_path / "bin", "nvidia-smi", NVIDIA_SMI)
    write_program(tmp_path / "bin", "docker", DOCKER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_DOCKER_CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = {"tp_size": 2, "artifacts_dir": built.artifacts.root.parent}
    with pytest.raises(BuildFailed, match=r"verify_engines failed in the container .* code 3"):
        verify(str(built.checkpoint), **options)
    monkeypatch.setenv("FAKE_OUTPUTS", str(tmp_path / "outputs.npz"))
    certificate, folder = verify(str(built.checkpoint), **options)
    assert folder == built.artifacts.root / "certificates" / "bf16-tp2-gpu"
    assert certificate.passed
    assert json.loads((folder / "certificate.json").read_text())["profile"] == "gpu"
    command = json.loads((tmp_path / "calls").read_text().splitlines()[-1])
    module = command.index("build.verify_engines")
    assert command[module - 2 : module] == ["python3", "-m"]
    for expected in (f"--model={built.checkpoint}", "--tp-size=2", "--precision=bf16"):
        assert expected in command[module:]


# --- what is refused ----------------------------------------------------------------------------


def test_another_checkpoint_under_the_same_name(built: Built, tmp_path: Path) -> None:
    other = Path(shutil.copytree(built.checkpoint, tmp_path / "other" / "tiny"))
    tensors = load_file(other / "model.safetensors")
    tensors["mlp1.1.bias"] += 1
    save_file(tensors, other / "model.safetensors")
    options = {"profile": "cpu", "tp_size": 2, "artifacts_dir": built.artifacts.root.parent}
    with pytest.raises(ArtifactMismatch, match=r"is not the checkpoint .* make engines MODEL=tiny"):
        verify(str(other), **options)
    assert not (built.artifacts.root / "certificates").exists()


def test_what_was_not_built_and_what_has_no_reference(built: Built) -> None:
    options = {"profile": "cpu", "artifacts_dir": built.artifacts.root.parent}
    with pytest.raises(ArtifactMismatch, match="no finished step 'llm bf16-tp1'"):
        verify(str(built.checkpoint), tp_size=1, **options)
    with pytest.raises(BuildFailed, match="'fp8' cannot be verified"):
        verify(str(built.checkpoint), tp_size=2, precision="fp8", **options)


def test_a_machine_without_torch_or_memory(
    built: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(built.checkpoint), "--tp-size", "2", "--profile", "cpu"]
    arguments += ["--artifacts", str(built.artifacts.root.parent)]
    with monkeypatch.context() as patch:
        patch.setattr("build.verify.check_memory", refuse_memory)
        assert main(arguments) == 1
        assert "takes about 7 GB" in capsys.readouterr().err
    find_spec = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    assert main(arguments) == 1
    assert "needs torch, which is not installed: `make test-env`" in capsys.readouterr().err


def refuse_memory(*_: object) -> None:
    raise BuildFailed("verifying this model takes about 7 GB")
