"""Stand-ins for what only a GPU machine has: programs on PATH, packages, and a compiler.

The fakes say what NVIDIA's programs say in the situations that the project handles. The vision
graph is compiled for real, by TensorRT for RTX, which needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from build import pin

NVIDIA_SMI = """
import os, sys
count = int(os.environ.get("FAKE_GPUS", "2"))
if count < 0:
    sys.exit(9)
for index in range(count):
    capability = os.environ.get("FAKE_CAPABILITIES", "8.0").split()
    capability = capability[index % len(capability)]
    print(f"{index}, GPU-{index}abc, NVIDIA A100-SXM4-80GB, {capability}")
"""

TRTLLM_BUILD = """
import json, os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
checkpoint = pathlib.Path(flags["--checkpoint_dir"])
output = pathlib.Path(flags["--output_dir"])
print("[TensorRT-LLM] TensorRT-LLM version: 0.21.0", flush=True)
mode = os.environ.get("FAKE_TRTLLM_BUILD", "")
pretrained = json.loads((checkpoint / "config.json").read_text())
# Keys of MODEL_MAP in tensorrt_llm/models/__init__.py for our two language models.
known = ("Qwen2ForCausalLM", "QWenForCausalLM", "InternLM2ForCausalLM", "LlamaForCausalLM")
if pretrained["architecture"] not in known:
    sys.exit(f"KeyError: {pretrained['architecture']!r}")
output.mkdir(exist_ok=True)
tp_size = pretrained["mapping"]["tp_size"]
(output / "rank0.engine").write_bytes(b"half")
if mode == "fail":
    for line in range(40):
        print(f"line {line}", flush=True)
    sys.exit("RuntimeError: CUDA out of memory")
if mode == "hang":
    (checkpoint.parent / "hanging").write_text(str(os.getpid()))
    time.sleep(600)
if mode == "killed":
    os.kill(os.getpid(), 9)
enabled = lambda flag: flags[flag] == "enable"
config = {
    "version": "0.21.0",
    "pretrained_config": pretrained,
    "build_config": {
        "max_batch_size": int(flags["--max_batch_size"]),
        "max_seq_len": int(flags["--max_seq_len"]),
        "max_num_tokens": int(flags["--max_num_tokens"]),
        "max_beam_width": int(flags["--max_beam_width"]),
        "max_prompt_embedding_table_size": int(flags["--max_multimodal_len"]),
        "gather_context_logits": False,
        "plugin_config": {
            "use_paged_context_fmha": enabled("--use_paged_context_fmha") and mode != "override",
            "context_fmha": enabled("--context_fmha"),
            "remove_input_padding": enabled("--remove_input_padding"),
        },
    },
}
(output / "config.json").write_text(json.dumps(config))
for rank in range(tp_size):
    (output / f"rank{rank}.engine").write_bytes(b"engine")
"""

# Writes what it was called with; `docker run` of the project fails or ends well as it is told.
DOCKER = """
import json, os, pathlib, sys
with pathlib.Path(os.environ["FAKE_DOCKER_CALLS"]).open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
mode = os.environ.get("FAKE_DOCKER", "")
command = sys.argv[1]
if command == "version":
    if mode == "no daemon":
        sys.exit("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
    print("28.3.0")
elif command == "build":
    sys.exit(1 if mode == "no build" else 0)
elif "--list-gpus" in sys.argv:
    if mode == "no gpus":
        sys.exit('docker: could not select device driver "" with capabilities: [[gpu]].')
    print("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0abc)")
else:
    print("in the container")
    sys.exit(int(os.environ.get("FAKE_EXIT_CODE", "0")))
"""


def write_program(folder: Path, name: str, code: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!{sys.executable} -I\n{code}")
    program.chmod(0o755)
    return program


def write_package(folder: Path, name: str, version: str) -> None:
    """What importlib.metadata needs to find a package of this version."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def fake_tensorrt() -> ModuleType:
    """TensorRT for RTX under TensorRT's name: it compiles for an A100 without having one."""
    import tensorrt_rtx

    class Builder:
        def __init__(self, log: object) -> None:
            self._builder = tensorrt_rtx.Builder(log)

        def __getattr__(self, name: str) -> object:
            return getattr(self._builder, name)

        def build_serialized_network(self, network: object, config: object) -> object:
            config.num_compute_capabilities = 1
            config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM80, 0)
            return self._builder.build_serialized_network(network, config)

    module = ModuleType("tensorrt")
    module.__dict__.update({**vars(tensorrt_rtx), "__name__": "tensorrt", "Builder": Builder})
    module.__version__ = f"{pin.TENSORRT}.0.33"
    return module
