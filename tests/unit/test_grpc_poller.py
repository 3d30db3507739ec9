"""gRPC's poller is chosen before gRPC is imported, and nobody else hears of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAY = """
import os, sys
from internvl_triton.grpc_poller import prefer_light_poller
prefer_light_poller()
print(getattr(sys.modules.get("grpc"), "SEEN", None), os.environ.get("GRPC_EXPERIMENTS"))
"""


def said(tmp_path: Path, code: str, **environment: str) -> str:
    """What `code` prints where gRPC is a module that notes what it finds when it is imported."""
    (tmp_path / "grpc.py").write_text("import os; SEEN = os.environ.get('GRPC_EXPERIMENTS')\n")
    clean = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": str(tmp_path), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip()


def test_grpc_is_imported_with_the_lighter_poller(tmp_path: Path) -> None:
    assert said(tmp_path, SAY) == "-event_engine_client None"


@pytest.mark.parametrize("value", ["", "-tcp_frame_size_tuning"])
def test_the_callers_own_experiments_stay(tmp_path: Path, value: str) -> None:
    assert said(tmp_path, SAY, GRPC_EXPERIMENTS=value) == f"None {value}".strip()


def test_an_imported_grpc_stays(tmp_path: Path) -> None:
    assert said(tmp_path, "import grpc" + SAY) == "None None"


def test_grpc_knows_the_experiment() -> None:
    """gRPC itself says so where it does not: a line about an unknown experiment."""
    code = SAY + "import grpc; grpc.insecure_channel('127.0.0.1:9').close()"
    environment = {**os.environ, "GRPC_VERBOSITY": "info"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert "nknown experiment" not in found.stderr


@pytest.mark.parametrize(
    "use",
    ["grpc_transport.GrpcTransport('127.0.0.1:9')", "triton_config._messages()"],
    ids=["grpc_transport", "triton_config"],
)
def test_whoever_imports_grpc_chooses_first(use: str) -> None:
    module, _, call = use.partition(".")
    code = f"""
import asyncio, sys
from internvl_triton import {module}
imported = []
{module}.prefer_light_poller = lambda: imported.append("grpc" in sys.modules)
async def run():
    {module}.{call}
asyncio.run(run())
print(imported, "grpc" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[False] True"
