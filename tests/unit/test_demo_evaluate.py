"""The evaluation: fresh scenes, one table; and the picture of the training's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from demo.curve import draw_curve
from demo.dialogue import QUESTION_KINDS
from demo.evaluate import evaluate, evaluation_examples


def test_examples_are_always_the_same() -> None:
    one, same = list(evaluation_examples(30)), list(evaluation_examples(30))
    assert one == same
    assert one != list(evaluation_examples(30, seed=1))
    assert {len(e.scenes) for e in one if e.media == "video"} == {4}


def test_a_thousand_examples_ask_every_kind_often() -> None:
    asked = dict.fromkeys(QUESTION_KINDS, 0)
    for example in evaluation_examples(1000):
        for branch in example.branches:
            for exchange in branch:
                asked[exchange.kind] += 1
    assert min(asked.values()) >= 90, asked


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [
        {"stage": "see", "step": step, "seconds": step, "dense": 2.0 - step / 100, "digit": 0.1}
        for step in range(25, 100, 25)
    ]
    lines += [
        {"stage": "talk", "step": step, "seconds": 100 + step, "loss": 1 / step, "exact": 0.5}
        for step in range(25, 100, 25)
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    draw_curve(log, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size[0] > 500
        assert len(image.getcolors(10**6)) > 5


def test_random_weights_are_wrong(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")
    from demo.export import write_qwen2_layout
    from demo.model import demo_config, start_weights
    from demo.vocabulary import demo_vocabulary
    from internvl_triton.model_spec import ModelSpec

    spec = ModelSpec.from_config(demo_config(len(demo_vocabulary().qwen2_tokens)))
    checkpoint = write_qwen2_layout(start_weights(spec, seed=0), tmp_path / "random")
    lines = evaluate(checkpoint, 3, seed=0, bos=False).splitlines()
    assert lines[0].split()[0] == "all"
    assert float(lines[0].split()[-2]) < 10
