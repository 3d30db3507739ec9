"""One running service per model family, built and started when the first test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from build.demo_checkpoint import DEMO, DEMO_INTERNLM2, DEMO_NAMES, demo_checkpoint
from build.engines import build_engines
from build.serve import make_server
from internvl_triton.client import Client
from internvl_triton.random_checkpoint import tiny_config, write_random_checkpoint
from internvl_triton.triton_server import TritonServer, find_free_port

if TYPE_CHECKING:
    from tests.oracle import Oracle

READY_TIMEOUT_S = 120.0
# Two ranks divide neither the vocabulary nor the kv head of the small random model.
TP_SIZES = {"qwen2": 1, "internlm2": 2, DEMO: 1, DEMO_INTERNLM2: 2}


def tiny_service_config(family: str) -> dict[str, Any]:
    """Both language models, each with another vision tower; small enough for 13 tiles."""
    vit = {"qwen2": "300m", "internlm2": "6b"}[family]
    return tiny_config(family, vit, num_heads=2, num_kv_heads=1)  # type: ignore[arg-type]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The launcher's tests come first: they want no other server of this process to be running."""
    items.sort(key=lambda item: item.path.name != "test_triton_server.py")


@dataclass(frozen=True)
class Service:
    """A running server for one small checkpoint."""

    checkpoint: Path
    artifacts_dir: Path
    tp_size: int
    server: TritonServer
    client: Client

    def statistics(self, model: str) -> Any:
        """Triton's ModelStatistics of one step, since the start."""
        from tritonclient.grpc import InferenceServerClient

        with InferenceServerClient(self.server.grpc_url) as client:
            (found,) = client.get_inference_statistics(model).model_stats
        return found


@pytest.fixture(scope="session")
def start_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Service]]:
    """A family's small random model, or a demo model by name -> its service.

    All are stopped when the session ends.
    """
    services: dict[str, Service] = {}
    with ExitStack() as running:

        def start(name: str) -> Service:
            if name not in services:
                tp_size = TP_SIZES[name]
                root = tmp_path_factory.mktemp(f"service_{name}")
                checkpoint = _checkpoint(name, root)
                artifacts_dir = root / "artifacts"
                build_engines(
                    str(checkpoint), tp_size=tp_size, artifacts_dir=artifacts_dir, progress=False
                )
                server = running.enter_context(new_server(checkpoint, artifacts_dir, tp_size))
                server.wait_ready(READY_TIMEOUT_S)
                client = running.enter_context(Client(server.grpc_url, timeout_s=300))
                services[name] = Service(checkpoint, artifacts_dir, tp_size, server, client)
            return services[name]

        yield start


def _checkpoint(name: str, root: Path) -> Path:
    if name in DEMO_NAMES:
        return demo_checkpoint(name, root / name)
    return write_random_checkpoint(root / f"tiny-{name}", tiny_service_config(name))


@pytest.fixture
def service(family: str, start_service: Callable[[str], Service]) -> Service:
    return start_service(family)


@pytest.fixture
def qwen2(start_service: Callable[[str], Service]) -> Service:
    """For tests of what does not depend on the family."""
    return start_service("qwen2")


@pytest.fixture(scope="session")
def load_oracle() -> Callable[[Path], Oracle]:
    """Checkpoint -> its oracle, loaded once. Skips the test when torch is not installed."""
    pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
    from tests.oracle import Oracle

    loaded: dict[Path, Oracle] = {}

    def load(checkpoint: Path) -> Oracle:
        if checkpoint not in loaded:
            loaded[checkpoint] = Oracle(checkpoint)
        return loaded[checkpoint]

    return load


def new_server(
    checkpoint: Path, artifacts_dir: Path, tp_size: int = 1, *, postprocessing_batch: int = 1
) -> TritonServer:
    """A server on free ports, not yet started."""
    return make_server(
        str(checkpoint),
        tp_size=tp_size,
        postprocessing_batch=postprocessing_batch,
        artifacts_dir=artifacts_dir,
        http_port=find_free_port(),
        grpc_port=find_free_port(),
        metrics_port=find_free_port(),
    )
