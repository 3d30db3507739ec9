"""How much memory `make verify` asks for, and its sentence when there is less."""

from pathlib import Path

import pytest

from build.parity.memory import available_bytes, check_memory, needed_bytes
from internvl_triton.errors import BuildFailed
from internvl_triton.model_spec import ModelSpec
from internvl_triton.published_models import published_config


def spec(name: str) -> ModelSpec:
    return ModelSpec.from_config(published_config(name))


def test_engines_on_the_cpu_hold_everything_as_float32() -> None:
    """938,193,024 parameters * 4 + 1.5e9; those of 78B need 315 GB."""
    assert needed_bytes(spec("InternVL2_5-1B"), "cpu") == 4 * 938_193_024 + 1_500_000_000
    assert needed_bytes(spec("InternVL2_5-78B"), "cpu") // 10**9 == 315


def test_with_engines_on_gpus_the_reference_streams() -> None:
    """78B: 10 bytes for each weight of the embedding (151674 * 8192), and 64 heads' scores of 4096
    tokens, 8 bytes each: 12.4e9 + 8.6e9 + 1.5e9."""
    found = needed_bytes(spec("InternVL2_5-78B"), "gpu")
    assert found == 10 * 151674 * 8192 + 8 * 64 * 4096**2 + 1_500_000_000


def test_too_little_memory_is_a_sentence_with_both_numbers(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 32000000 kB\nMemAvailable:    16000000 kB\n")
    assert available_bytes(meminfo) == 16_384_000_000
    check_memory(spec("InternVL2_5-1B"), "cpu", meminfo=meminfo)
    with pytest.raises(BuildFailed, match="takes about 34 GB of memory, and 16 GB are available"):
        check_memory(spec("InternVL2_5-8B"), "cpu", meminfo=meminfo)
    check_memory(spec("InternVL2_5-8B"), "cpu", meminfo=tmp_path / "absent")
