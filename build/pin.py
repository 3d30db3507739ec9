"""The one container that engines are built and served in, and what is inside it.

Engines run only in the TensorRT and TensorRT-LLM that built them. 0.21 is the last release in
which engines are first class. `build/Dockerfile` starts FROM the same tag.
"""

__all__ = ["IMAGE", "TENSORRT", "TENSORRT_LLM"]

IMAGE = "nvcr.io/nvidia/tritonserver:25.08-trtllm-python-py3"
TENSORRT_LLM = "0.21.0"
TENSORRT = "10.11"
