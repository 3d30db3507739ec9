"""Engines that answer at once: what the pipeline around them costs is what is left.

`vision_encoder.py` and `tensorrt_llm.py` are model.py files of those two steps, with the same
configs. `benchmarks/pipeline_cost.py` serves them between the real steps.
"""
