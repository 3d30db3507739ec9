"""The standalone language model directory: files, names, bytes, config fields, and failures."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from export import export_hf_llm
from export.hf_llm import main
from internvl_triton.checkpoint_layout import llm_shapes
from internvl_triton.errors import BuildFailed, IncompleteCheckpoint
from internvl_triton.model_spec import ModelSpec
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint

CODE = ("configuration_internlm2.py", "modeling_internlm2.py", "tokenization_internlm2.py")


def read(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of all shards; each shard says that it is transformers' kind."""
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="np") as opened:
            assert opened.metadata() in ({"format": "pt"}, None)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors


@pytest.fixture
def output(checkpoint: Path, tmp_path: Path) -> Path:
    return export_hf_llm(checkpoint, tmp_path / "llm", progress=False)


def test_tensors_are_those_of_the_family_byte_for_byte(
    checkpoint: Path, output: Path, spec: ModelSpec
) -> None:
    source, tensors = read(checkpoint), read(output)
    expected = {
        name.removeprefix("language_model."): shape for name, shape in llm_shapes(spec.llm).items()
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    for name, tensor in tensors.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, source["language_model." + name])


def test_names_of_the_family(output: Path, family: str) -> None:
    names = set(read(output))
    assert names >= (
        {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"}
        if family == "qwen2"
        else {"model.tok_embeddings.weight", "model.layers.1.attention.wqkv.weight"}
        | {"output.weight", "model.layers.0.feed_forward.w2.weight"}
    )


def test_config(checkpoint: Path, output: Path, family: str) -> None:
    source = json.loads((checkpoint / "config.json").read_text())["llm_config"]
    config = json.loads((output / "config.json").read_text())
    qwen2 = family == "qwen2"
    assert config == source | {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "InternLM2ForCausalLM"],
        "model_type": family,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    assert config["rope_scaling"] == (None if qwen2 else {"type": "dynamic", "factor": 2.0})


def test_answers_end_at_im_end(output: Path, family: str) -> None:
    """Not at `llm_config.eos_token_id`, which is 2, </s>, in the published InternLM2 sizes."""
    generation = json.loads((output / "generation_config.json").read_text())
    added = {
        entry["content"]: int(index)
        for index, entry in json.loads((output / "tokenizer_config.json").read_text())[
            "added_tokens_decoder"
        ].items()
    }
    assert generation["eos_token_id"] == added["<|im_end|>"]
    assert ("bos_token_id" in generation) == (family == "internlm2")


def test_tokenizer_files_are_copied(checkpoint: Path, output: Path, family: str) -> None:
    files = {path.name for path in output.iterdir()}
    vocabulary = {"vocab.json", "merges.txt"} if family == "qwen2" else {"tokenizer.model"}
    assert files >= vocabulary | {"tokenizer_config.json"}
    for name in files - {"config.json", "generation_config.json", "model.safetensors"}:
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()


def test_settings_of_somebodys_machine_are_dropped(tmp_path: Path) -> None:
    config = tiny_config("qwen2", "300m", llm_layers=1)
    config["llm_config"] |= {"_name_or_path": "./x", "attn_implementation": "flash_attention_2"}
    checkpoint = write_random_checkpoint(tmp_path / "c", config)
    written = json.loads(
        (export_hf_llm(checkpoint, tmp_path / "o", progress=False) / "config.json").read_text()
    )
    assert not {"_name_or_path", "attn_implementation"} & set(written)


def test_shards_of_the_source(tmp_path: Path) -> None:
    """A shard of vision tensors alone has no counterpart."""
    config = tiny_config("internlm2", "300m")
    checkpoint = write_random_checkpoint(tmp_path / "c", config, shards=5)
    with safe_open(checkpoint / "model-00001-of-00005.safetensors", framework="np") as opened:
        assert all(name.startswith("vision_model.") for name in opened.keys())  # noqa: SIM118
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    holding = {file for name, file in index.items() if name.startswith("language_model.")}
    output = export_hf_llm(checkpoint, tmp_path / "o", progress=False)
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    total = len(holding)
    assert 1 < total < 5
    assert shards == [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    written = json.loads((output / "model.safetensors.index.json").read_text())
    tensors = read(output)
    assert written["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    for shard in shards:
        with safe_open(output / shard, framework="np") as opened:
            names = set(opened.keys())
        assert names == {name for name, file in written["weight_map"].items() if file == shard}
    assert set(written["weight_map"]) == set(tensors)


def test_internlm2_brings_its_code_if_there_is_some(tmp_path: Path) -> None:
    config = tiny_config("internlm2", "300m", llm_layers=1)
    checkpoint = write_random_checkpoint(tmp_path / "c", config)
    for name in CODE:
        (checkpoint / name).write_text(f"# {name}\n")
    output = export_hf_llm(checkpoint, tmp_path / "o", progress=False)
    assert all((output / name).read_text() == f"# {name}\n" for name in CODE)
    auto_map = json.loads((output / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_internlm2.InternLM2ForCausalLM"


def test_an_older_directory_is_replaced_and_foreign_files_are_not(
    checkpoint: Path, output: Path
) -> None:
    export_hf_llm(checkpoint, output, progress=False)
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(BuildFailed, match=r"holds 'thesis\.txt', which this step did not write"):
        export_hf_llm(checkpoint, output, progress=False)


def test_without_a_tokenizer_nothing_is_written(tmp_path: Path) -> None:
    config = tiny_config("qwen2", "300m", llm_layers=1)
    checkpoint = write_random_checkpoint(tmp_path / "c", config, zeros=True, tokenizer=False)
    with pytest.raises(IncompleteCheckpoint, match="has no tokenizer"):
        export_hf_llm(checkpoint, tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_refused_before_writing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    with pytest.raises(BuildFailed, match=r"needs 0\.0 GB, its disk has 0\.0 GB free"):
        export_hf_llm(checkpoint, tmp_path / "deep" / "o", progress=False)
    assert not (tmp_path / "deep").exists()


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "o")]) == 1
    assert "has no config.json: not a checkpoint" in capsys.readouterr().err
    assert main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_make_export_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name or a directory; what it writes lies beside the other artefacts of the model."""
    from build.hf_llm import main as make

    assert make(["--model", "InternVL2_5-3B", "--artifacts", str(tmp_path)]) == 1
    assert "is neither a directory nor a known name" in capsys.readouterr().err
    checkpoint = write_random_checkpoint(
        tmp_path / "source" / "mine", tiny_config("internlm2", "300m", llm_layers=1)
    )
    assert make(["--model", str(checkpoint), "--artifacts", str(tmp_path)]) == 0
    assert (tmp_path / "mine" / "llm" / "hf" / "model.safetensors").is_file()
