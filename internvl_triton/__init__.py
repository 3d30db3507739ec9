"""InternVL2.5 on NVIDIA Triton: what the exporters, the models, the clients and the benchmarks share."""

__version__ = "0.1.0"
