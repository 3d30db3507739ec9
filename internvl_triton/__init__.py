"""InternVL2.5 on NVIDIA Triton: what exporters, models, clients and benchmarks share."""

__version__ = "0.1.0"
