from __future__ import annotations

from pathlib import Path

import pytest

from build.demo_checkpoint import DEMO, demo_checkpoint, demo_spec
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
    made = resolve_checkpoint("demo", tmp_path / "artifacts")  # a name wins over a directory
    assert made == tmp_path / "artifacts" / "checkpoints" / "demo"


@pytest.mark.parametrize("name", ["InternVL2_5-9B", "internvl", "", "no/such/directory"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownModel, match=r"Names: demo, InternVL2_5-1B.*MODEL=path/to"):
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


def test_the_demo_checkpoint_is_made_once(tmp_path: Path) -> None:
    directory = demo_checkpoint(DEMO, tmp_path / "demo")
    spec = ModelSpec.from_checkpoint(directory)
    assert spec == demo_spec(DEMO)
    Checkpoint(directory).check(checkpoint_shapes(spec))
    weights = (directory / "model.safetensors").stat()
    assert weights.st_size < 15e6
    demo_checkpoint(DEMO, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns


def test_a_killed_demo_checkpoint_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    (tmp_path / "demo.tmp").mkdir()
    directory.mkdir()
    (directory / "config.json").write_text("{")
    demo_checkpoint(DEMO, directory)
    ModelSpec.from_checkpoint(directory)
    assert not (tmp_path / "demo.tmp").exists()
