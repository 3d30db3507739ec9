"""The training loop: it learns, it stops and goes on as if it had not, it saves safely."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: see `make test-env`")

from demo import training  # noqa: E402
from demo.batch import collate, split_by_length  # noqa: E402
from demo.dialogue import make_example  # noqa: E402
from demo.encoding import encode_example  # noqa: E402
from demo.loss import answer_logits, count_exact  # noqa: E402
from demo.model import demo_config, start_weights, visual_features  # noqa: E402
from demo.stages import STAGES, Stage, learning_rate  # noqa: E402
from internvl_triton.errors import InvalidCheckpoint  # noqa: E402
from internvl_triton.model_spec import ModelSpec  # noqa: E402

MIX = {"one_tile": 0.5, "text": 0.3, "crowd": 0.2}
RATES = {"muon": 1e-2, "adamw": 1e-3}
TINY = (
    Stage("see small", "tower", 56, 2, 2, RATES, {"one_tile": 1.0}, 0.1, 1),
    Stage("talk small", "language", 112, 4, 2, RATES, MIX, 0.1, 1),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of a few steps at tiles of 56 and 112 pixels."""
    monkeypatch.setattr(training, "STAGES", TINY)
    monkeypatch.setattr(training, "_MAX_TILES_AT_ONCE", {56: 4, 112: 4})


def trained(directory: Path, stops: list[int]) -> training.State:
    """The state after runs that are each stopped after so many steps, then one to the end."""
    for steps in [*stops, 10**9]:
        trainer = training.Trainer(directory, seed=0, threads=2)
        step, done = trainer._step, []

        def counted(*arguments: object, step=step, done=done, trainer=trainer, steps=steps):
            done.append(1)
            if len(done) == steps:
                trainer.stop()
            return step(*arguments)

        trainer._step = counted
        trainer.run(minutes=10)
    return trainer.state


@pytest.mark.usefixtures("tiny")
def test_a_training_in_pieces_is_the_training_in_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", [])
    pieces = trained(tmp_path / "pieces", [3])
    assert (whole.stage, whole.step) == (pieces.stage, pieces.step) == (2, 0)
    for name, tensor in whole.weights.items():
        # Two threads add in no fixed order, so even equal runs differ by rounding.
        assert torch.allclose(tensor, pieces.weights[name], atol=1e-5), name
        assert torch.allclose(whole.average[name], pieces.average[name], atol=1e-5), name


@pytest.mark.usefixtures("tiny")
def test_the_log_is_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_LOG_STEPS", 1)
    monkeypatch.setattr(training, "_CHECK_STEPS", 4)
    state = trained(tmp_path, [])
    assert trained(tmp_path, []).seconds == state.seconds  # finished: nothing more to do
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "dense" in line] == [1, 2]
    assert [line["step"] for line in lines if "words" in line] == [1, 2, 3, 4]
    assert any("exact" in line for line in lines)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    trainer = training.Trainer(tmp_path, seed=0, threads=2)
    trainer.state.tokens = trainer.state.tokens[:-1]
    trainer._save()
    with pytest.raises(InvalidCheckpoint, match="another vocabulary"):
        training.Trainer(tmp_path, seed=0, threads=2)


def test_repeating_one_batch_teaches_it(tmp_path: Path) -> None:
    trainer = training.Trainer(tmp_path, seed=0, threads=2)
    fast = {"muon": 3e-2, "adamw": 3e-3}
    stage = Stage("memory", "language", 224, 100, 1, fast, {"text": 1.0}, 1.0, 1)
    spec = trainer.spec(stage)
    for tensor in trainer.state.weights.values():
        tensor.requires_grad_()
    optimizers = training._optimizers(trainer.state.weights, stage)
    losses = [trainer._step(stage, spec, optimizers)["loss"] for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]


def test_branches_do_not_see_each_other(tmp_path: Path) -> None:
    """The logits of a branch among others are those of the branch alone."""
    trainer = training.Trainer(tmp_path, seed=0, threads=2)
    spec = ModelSpec.from_config(demo_config(len(trainer.tokenizer), tile_size=112))
    weights = start_weights(spec, seed=1)
    example = make_example(random.Random(4), "one_tile", tile_size=112)

    def logits(branches: tuple) -> torch.Tensor:
        alone = type(example)(example.scenes, example.media, branches)
        row = encode_example(alone, tokenizer=trainer.tokenizer, spec=spec, bos=True)
        batch = collate([row], vocab_size=spec.llm.vocab_size)
        features = visual_features(weights, batch.tiles, spec)
        return answer_logits(weights, batch, features, spec)[0]

    together = logits(example.branches)
    alone = torch.cat([logits((branch,)) for branch in example.branches])
    assert torch.allclose(together, alone, atol=1e-4)


def test_rows_of_a_batch_do_not_disturb_each_other(tmp_path: Path) -> None:
    trainer = training.Trainer(tmp_path, seed=0, threads=2)
    stage = Stage("mixed", "language", 112, 1, 12, RATES, STAGES[-1].mix)
    spec = trainer.spec(stage)
    rows = training.draw_rows("some", stage, trainer.tokenizer, spec)
    weights = start_weights(spec, seed=1)
    groups = split_by_length(rows, max_tiles=6)
    assert sorted(map(id, rows)) == sorted(id(row) for group in groups for row in group)

    def logits(some: list) -> torch.Tensor:
        batch = collate(some, vocab_size=spec.llm.vocab_size)
        features = visual_features(weights, batch.tiles, spec)
        return answer_logits(weights, batch, features, spec)[0]

    group = max(groups, key=len)
    assert len(group) > 1
    alone = torch.cat([logits([row]) for row in group])
    assert torch.allclose(logits(group), alone, atol=1e-4)
    right, asked, wrong = count_exact(weights, rows, spec)
    assert sum(asked.values()) == sum(len(row.answers) for row in rows)
    assert len(wrong) == sum(asked.values()) - sum(right.values())


def test_rows_follow_from_the_seed(tmp_path: Path) -> None:
    trainer = training.Trainer(tmp_path, seed=0, threads=2)
    stage = STAGES[3]
    spec = trainer.spec(stage)
    one, same, other = (
        training.draw_rows(seed, stage, trainer.tokenizer, spec) for seed in ("1", "1", "2")
    )
    assert [row.ids.tolist() for row in one] == [row.ids.tolist() for row in same]
    assert all((a.tiles == b.tiles).all() for a, b in zip(one, same, strict=True))
    assert [row.ids.tolist() for row in one] != [row.ids.tolist() for row in other]


def test_the_rate_rises_then_falls() -> None:
    for stage in STAGES:
        rates = [learning_rate(stage, step) for step in range(stage.steps)]
        peak = rates.index(max(rates))
        assert rates[0] <= 0.1
        assert peak < 2 * stage.warmup_steps
        assert 0.7 < max(rates) <= 1
        assert rates[-1] == pytest.approx(stage.final, rel=0.05)
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
