"""PRECISION=int4_awq, fp8, int8_sq and KV_CACHE=fp8, int8: scales measured on pictures and prompts.

samples   the calibration set: the user's pictures and prompts, or the built-in ones
inputs    samples -> what the language model sees of them: token ids and visual features
quantize  drives ModelOpt over those; a process of its own, whose GPU memory ends with it
layout    the tensors that the TensorRT-LLM checkpoint must have then
steps     the steps of `make engines` that do it
"""
