from __future__ import annotations

from pathlib import Path

import pytest

from build.demo_checkpoint import (
    DEMO_INTERNLM2,
    DEMO_NAMES,
    SHIPPED,
    demo_checkpoint,
    demo_spec,
)
from build.model_source import artifact_name, resolve_checkpoint
from internvl_triton.checkpoint import Checkpoint
from internvl_triton.checkpoint_layout import checkpoint_shapes
from internvl_triton.errors import DownloadFailed, UnknownModel
from internvl_triton.model_spec import ModelSpec


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifact_name("demo") == "demo"
    assert artifact_name("InternVL2_5-26B") == "InternVL2_5-26B"
    assert artifact_name("InternVL2_5-8B-MPO") == "InternVL2_5-8B-MPO"
    assert artifact_name("OpenGVLab/InternVL2_5-8B") == "InternVL2_5-8B"
    assert artifact_name(str(tmp_path)) == tmp_path.name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert resolve_checkpoint("./demo", tmp_path / "artifacts") == tmp_path / "demo"
    assert resolve_checkpoint("demo", tmp_path) == SHIPPED  # a name wins over a directory


@pytest.mark.parametrize("name", ["InternVL2_5-9B", "internvl", "", "no/such/directory"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(
        UnknownModel, match=r"Names: demo, demo-internlm2, InternVL2_5-1B.*MODEL=path/to"
    ):
        artifact_name(name)


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(UnknownModel, match=r"did you mean InternVL2_5-8B\?"):
        artifact_name("InternVL2.5-8B")


def test_without_the_hub_the_error_says_how_to_pass_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DownloadFailed, match=r"not known\n.*MODEL=path/to/InternVL2_5-1B"):
        resolve_checkpoint("InternVL2_5-1B", tmp_path)


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_a_demo_checkpoint_is_complete_and_small(name: str, tmp_path: Path) -> None:
    directory = demo_checkpoint(name, tmp_path / name)
    spec = ModelSpec.from_checkpoint(directory)
    assert spec == demo_spec(name)
    checkpoint = Checkpoint(directory)
    checkpoint.check(checkpoint_shapes(spec))
    assert {checkpoint.dtype(tensor) for tensor in checkpoint.names} == {"BF16"}
    assert sum(file.stat().st_size for file in directory.iterdir()) < 15e6
    assert (spec.tile_size, spec.tokens_per_tile, spec.max_tiles_with_thumbnail) == (448, 256, 13)
    assert spec.llm.family == ("internlm2" if name == DEMO_INTERNLM2 else "qwen2")


def test_the_other_layout_is_made_once(tmp_path: Path) -> None:
    directory = demo_checkpoint(DEMO_INTERNLM2, tmp_path / "made")
    made = (directory / "model.safetensors").stat().st_mtime_ns
    demo_checkpoint(DEMO_INTERNLM2, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == made


def test_a_killed_or_old_other_layout_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "made"
    (tmp_path / "made.tmp").mkdir()
    directory.mkdir()
    (directory / "config.json").write_text("{")
    (directory / "made-from").write_text("other weights")
    demo_checkpoint(DEMO_INTERNLM2, directory)
    assert ModelSpec.from_checkpoint(directory) == demo_spec(DEMO_INTERNLM2)
    assert not (tmp_path / "made.tmp").exists()
