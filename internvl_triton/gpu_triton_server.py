"""Runs the tritonserver of NVIDIA's container: one process, or one rank for each GPU under mpirun.

The command line is that of NVIDIA's own launcher, `triton_backend/scripts/launch_triton_server.py`
(NVIDIA/TensorRT-LLM @ 0b06796b), with addresses, an exit timeout and names of shared memory added.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_triton import tensor_contract as contract
from internvl_triton.triton_server import KILL_GRACE_S, TritonServer, control_options

__all__ = ["GpuTritonServer", "ServerOptions", "launch_command", "launch_environment"]

PROGRAM = Path("/opt/tritonserver/bin/tritonserver")


@dataclass(frozen=True)
class ServerOptions:
    """What all ranks have in common; `program` is the path of tritonserver."""

    model_repository: Path
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    exit_timeout_s: int
    shared_memory_prefix: str
    control_token: str
    cuda_memory_pool_bytes: int
    program: Path = PROGRAM


def launch_command(options: ServerOptions, *, num_ranks: int) -> list[str]:
    """tritonserver itself for one rank, else mpirun with one tritonserver for each rank.

    Rank 0 loads all models, listens, and has the memory pool through which visual features pass.
    The others load the language model only, and wait inside its loading for rank 0's work.
    """
    servers = [_rank_command(options, rank) for rank in range(num_ranks)]
    if num_ranks == 1:
        return servers[0]
    command = ["mpirun", "--allow-run-as-root"]
    for server in servers:
        command += ["-n", "1", *server, ":"]
    return command[:-1]


def launch_environment(inherited: dict[str, str], *, exit_timeout_s: int) -> dict[str, str]:
    """The server's environment."""
    return {
        **inherited,
        # As NVIDIA's multimodal guide has it: PMIx without shared memory of its own.
        "PMIX_MCA_gds": "hash",
        # mpirun kills its ranks one second after SIGTERM by itself: let requests end first.
        "OMPI_MCA_odls_base_sigkill_timeout": str(exit_timeout_s + int(KILL_GRACE_S)),
    }


def _rank_command(options: ServerOptions, rank: int) -> list[str]:
    command = [
        str(options.program),
        f"--model-repository={options.model_repository}",
        f"--exit-timeout-secs={options.exit_timeout_s}",
    ]
    if rank == 0:
        command += [
            f"--http-address={options.host}",
            f"--http-port={options.http_port}",
            f"--grpc-address={options.host}",
            f"--grpc-port={options.grpc_port}",
            f"--metrics-address={options.host}",
            f"--metrics-port={options.metrics_port}",
            f"--cuda-memory-pool-byte-size=0:{options.cuda_memory_pool_bytes}",
            *control_options(options.control_token),
        ]
    else:
        command += [
            "--model-control-mode=explicit",
            f"--load-model={contract.TENSORRT_LLM.name}",
        ]
    prefix = f"{options.shared_memory_prefix}rank{rank}_"
    return [
        *command,
        "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]


class GpuTritonServer(TritonServer):
    """The server of the gpu profile, inside the container.

    Args beyond TritonServer's:
        num_ranks: the language model's tp_size.
        cuda_memory_pool_bytes: Triton's memory pool on GPU 0.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        num_ranks: int,
        cuda_memory_pool_bytes: int,
        http_port: int,
        grpc_port: int,
        metrics_port: int,
        host: str,
        log_path: Path | None = None,
        exit_timeout_s: int = 30,
        program: Path = PROGRAM,
    ) -> None:
        super().__init__(
            model_repository,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            host=host,
            log_path=log_path,
            exit_timeout_s=exit_timeout_s,
        )
        self.num_ranks = num_ranks
        self.cuda_memory_pool_bytes = cuda_memory_pool_bytes
        self.program = program

    def _environment_problem(self) -> str | None:
        needed: Sequence[str] = [str(self.program)]
        if self.num_ranks > 1:
            needed = [*needed, "mpirun"]
        for program in needed:
            if shutil.which(program) is None:
                return (
                    f"{program} is missing, which is part of NVIDIA's container; run `make serve` "
                    "with docker, or inside that container"
                )
        return None

    def _prepare(self, cleanup: contextlib.ExitStack) -> tuple[list[str], dict[str, str]]:
        options = ServerOptions(
            model_repository=self.model_repository,
            host=self.host,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=self.metrics_port,
            exit_timeout_s=self.exit_timeout_s,
            shared_memory_prefix=self._shared_memory_prefix,
            control_token=self._control_token,
            cuda_memory_pool_bytes=self.cuda_memory_pool_bytes,
            program=self.program,
        )
        program, *arguments = launch_command(options, num_ranks=self.num_ranks)
        environment = launch_environment(dict(os.environ), exit_timeout_s=self.exit_timeout_s)
        return [shutil.which(program) or program, *arguments], environment
