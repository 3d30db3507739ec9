"""What stands in for NVIDIA's two engines when the gpu profile's repository is served on a CPU."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from build.repository import assemble_repository
from internvl_triton.artifacts import Artifacts, LLMBuild
from internvl_triton.triton_server import TritonServer, find_free_port

__all__ = ["MAX_TILES_PER_RUN", "gpu_profile_server"]

MAX_TILES_PER_RUN = 13

# A module `tensorrt` that runs the vision graph in ONNX Runtime, on torch's CPU memory.
TENSORRT = f"""
import contextlib, ctypes, types
import numpy as np, onnxruntime, torch

__version__ = "10.11.0.33"
cpu = torch.device("cpu")
torch.device = lambda *_: cpu
torch.cuda.device = torch.cuda.stream = lambda _: contextlib.nullcontext()
torch.cuda.Stream = lambda _: types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
torch.Tensor.pin_memory = lambda tensor: tensor
TABLE = "prompt_embedding_table"

class Logger:
    ERROR = 1
    def __init__(self, severity): pass

class Runtime:
    def __init__(self, log): pass
    def deserialize_cuda_engine(self, plan): return Engine(plan.decode())

class Engine:
    num_io_tensors = 2
    def __init__(self, path): self.session = onnxruntime.InferenceSession(path)
    def get_tensor_name(self, index): return ["tiles", TABLE][index]
    def get_tensor_profile_shape(self, name, profile):
        return [(count, 448, 448, 3) for count in (1, 13, {MAX_TILES_PER_RUN})]
    def create_execution_context(self): return Context(self.session)

class Context:
    def __init__(self, session): self.session, self.at = session, {{}}
    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return shape[0] <= {MAX_TILES_PER_RUN}
    def get_tensor_shape(self, name): return (self.shape[0] * 256, 256)
    def set_tensor_address(self, name, address):
        self.at[name] = address
        return True
    def execute_async_v3(self, stream):
        pixels = (ctypes.c_uint8 * int(np.prod(self.shape))).from_address(self.at["tiles"])
        tiles = np.frombuffer(pixels, np.uint8).reshape(self.shape)
        table = torch.from_numpy(self.session.run([TABLE], {{"tiles": tiles}})[0])
        table = table.to(torch.bfloat16).contiguous()
        ctypes.memmove(self.at[TABLE], table.data_ptr(), table.nbytes)
        return True
"""


@contextlib.contextmanager
def gpu_profile_server(
    artifacts: Artifacts, llm: LLMBuild, backend: str
) -> Iterator[ServerWithBackend]:
    """The gpu profile's repository of a model that was built for the CPU, being served.

    artifacts: built with max_tiles_per_run=MAX_TILES_PER_RUN. backend: source of `tensorrtllm`.
    """
    artifacts.vision_plan.write_text(str(artifacts.vision_onnx))
    artifacts.llm_engine(llm).mkdir(parents=True)
    repository = assemble_repository(artifacts, llm, profile="gpu")
    (repository / "vision_encoder" / "1" / "tensorrt.py").write_text(TENSORRT)
    server = ServerWithBackend(
        repository,
        http_port=find_free_port(),
        grpc_port=find_free_port(),
        metrics_port=find_free_port(),
        log_path=artifacts.root / "log",
        # Two steps import torch: one after the other, or on a busy machine Triton gives up on them.
        arguments=["--model-load-thread-count=1"],
    )
    server.backend_source = backend
    with server:
        server.wait_ready(120)
        yield server
    assert server.exit_code == 0


class ServerWithBackend(TritonServer):
    """Triton runs `<backends>/<name>/model.py` in its Python backend for `backend: <name>`."""

    backend_source = ""

    def _prepare(self, cleanup: contextlib.ExitStack) -> tuple[list[str], dict[str, str]]:
        command, environment = super()._prepare(cleanup)
        (option,) = [part for part in command if part.startswith("--backend-directory=")]
        backends = Path(option.partition("=")[2])
        (backends / "tensorrtllm").mkdir()
        (backends / "tensorrtllm" / "model.py").write_text(self.backend_source)
        # For such a backend Triton accepts no library outside of the folder.
        for file in (backends / "python").iterdir():
            library = file.resolve()
            file.unlink()
            shutil.copy2(library, file)
        return command, environment
