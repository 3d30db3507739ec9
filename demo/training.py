"""The training loop and its state on disk."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from demo.batch import collate, split_by_length
from demo.dialogue import make_example, some_branches
from demo.encoding import Encoded, encode_example
from demo.loss import (
    DENSE_OUTPUTS,
    SOURCE_LAYERS,
    SOURCE_OUTPUTS,
    WORD_LAYERS,
    WORD_OUTPUTS,
    answer_loss,
    count_exact,
    dense_loss,
)
from demo.model import Weights, demo_config, start_weights, visual_features
from demo.muon import Muon
from demo.stages import STAGES, Stage, learning_rate
from demo.vocabulary import demo_vocabulary
from internvl_triton.errors import InvalidCheckpoint
from internvl_triton.model_spec import ModelSpec
from internvl_triton.tokenizer import Tokenizer, load_tokenizer

__all__ = ["State", "Trainer", "draw_rows"]

_MAX_TILES_AT_ONCE = {224: 32, 448: 8}
_PATCHES_PER_SIDE = 32  # of a tile of 448 pixels
_SAVE_SECONDS = 180
_LOG_STEPS = 25
_CHECK_STEPS = 150
_BY_ADAMW = (
    "language_model.model.embed_tokens",
    "language_model.lm_head",
    "dense",
    "word",
    "source",
)
_AVERAGE = 0.99  # decay of the average of the weights, which is what gets exported


@dataclass
class State:
    """Everything that a later run needs. `average` is the moving average of `weights`.

    tokens: the vocabulary that the embeddings stand for.
    """

    stage: int
    step: int
    seconds: float
    tokens: list[str]
    weights: Weights
    average: Weights
    optimizer: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Goes through STAGES from where the state in `directory` is.

    Each stage begins with the average weights of the one before.
    """

    def __init__(self, directory: Path, *, seed: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.directory = directory
        self.seed = seed
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer").mkdir(exist_ok=True)
        vocabulary = demo_vocabulary()
        vocabulary.write_qwen2(directory / "tokenizer")
        self.tokenizer = load_tokenizer(directory / "tokenizer")
        self.stopping = False
        path = directory / "state.pt"
        if path.is_file():
            self.state = State(**torch.load(path, weights_only=True))
            if self.state.tokens != vocabulary.qwen2_tokens:
                raise InvalidCheckpoint(
                    f"{path} was trained with another vocabulary than the questions and answers "
                    "now give; train in a new directory, or restore them"
                )
        else:
            config = demo_config(len(self.tokenizer))
            weights = start_weights(ModelSpec.from_config(config), seed=seed) | _heads(seed)
            average = {name: tensor.clone() for name, tensor in weights.items()}
            self.state = State(0, 0, 0.0, vocabulary.qwen2_tokens, weights, average)

    def spec(self, stage: Stage) -> ModelSpec:
        return ModelSpec.from_config(demo_config(len(self.tokenizer), tile_size=stage.tile_size))

    def stop(self) -> None:
        """After the step that is running: save and leave `run`."""
        self.stopping = True

    def run(self, *, minutes: float) -> None:
        deadline = time.monotonic() + 60 * minutes
        while self.state.stage < len(STAGES) and not self.stopping:
            self._run_stage(STAGES[self.state.stage], deadline)
            self._save()

    def _run_stage(self, stage: Stage, deadline: float) -> None:
        state, spec = self.state, self.spec(stage)
        for tensor in state.weights.values():
            tensor.requires_grad_()
        optimizers = _optimizers(state.weights, stage)
        for name, saved_state in state.optimizer.items():
            optimizers[name].load_state_dict(saved_state)
        saved = time.monotonic()
        recent: list[dict[str, float]] = []
        while state.step < stage.steps:
            begin = time.monotonic()
            recent.append(self._step(stage, spec, optimizers))
            state.step += 1
            state.seconds += time.monotonic() - begin
            state.optimizer = {name: o.state_dict() for name, o in optimizers.items()}
            if state.step % _LOG_STEPS == 0:
                self._log(stage, _means(recent))
                recent = []
            if stage.has_dialogues and state.step % _CHECK_STEPS == 0:
                self._log(stage, self._check(stage, spec))
            self.stopping = self.stopping or time.monotonic() > deadline
            if self.stopping:
                return
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        state.stage, state.step, state.optimizer = state.stage + 1, 0, {}
        state.weights = {name: tensor.detach().clone() for name, tensor in state.average.items()}

    def _step(self, stage: Stage, spec: ModelSpec, optimizers: dict[str, Any]) -> dict[str, float]:
        """One update; returns share of the peak rate, losses and dense accuracies of its batch."""
        import torch

        state = self.state
        weights = state.weights
        seed = f"{self.seed}/{stage.name}/{state.step}"
        rows = draw_rows(seed, stage, self.tokenizer, spec)
        origin = _window_origin(seed, stage, spec)
        num_tiles = sum(len(row.tiles) for row in rows)
        num_tokens = sum(answer.end - answer.begin for row in rows for answer in row.answers)
        num_answers = sum(len(row.answers) for row in rows)
        share_of_peak = learning_rate(stage, state.step)
        for tensor in weights.values():
            tensor.grad = None
        for name, optimizer in optimizers.items():
            for parameters in optimizer.param_groups:
                parameters["lr"] = stage.peak_rates[name] * share_of_peak
        sums: defaultdict[str, float] = defaultdict(float)
        for group in split_by_length(rows, max_tiles=_MAX_TILES_AT_ONCE[stage.tile_size]):
            batch = collate(group, vocab_size=spec.llm.vocab_size)
            with torch.set_grad_enabled(stage.has_labels):
                features = visual_features(weights, batch.tiles, spec, origin=origin)
            loss = torch.zeros(())
            if stage.has_dialogues and batch.ids.numel():
                answers, words, sources = answer_loss(weights, batch, features, spec)
                words, sources = words / num_answers, sources * len(group) / len(rows)
                sums["loss"] += answers.item() / num_tokens
                sums["words"] += words.item()
                sums["sources"] += sources.item()
                loss = loss + answers / num_tokens + 0.1 * words + 0.3 * sources
            if stage.has_labels and len(batch.tiles):
                dense, accuracy = dense_loss(weights, batch, features, origin=origin)
                share = len(batch.tiles) / num_tiles
                loss = loss + share * dense
                sums["dense"] += share * dense.item()
                for name, value in accuracy.items():
                    sums[name] += share * value
            if loss.requires_grad:
                loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        decay = min(_AVERAGE, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(state.average.values()), list(weights.values()), 1 - decay)
        return {"rate": share_of_peak, **sums}

    def _check(self, stage: Stage, spec: ModelSpec) -> dict[str, Any]:
        """Exact answers on scenes that training never draws, by the averaged weights."""
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        wrong = []
        for number in range(5):
            rows = draw_rows(f"check/{number}", stage, self.tokenizer, spec)
            for group in split_by_length(rows, max_tiles=_MAX_TILES_AT_ONCE[stage.tile_size]):
                origin = _window_origin("", stage, spec)
                some = count_exact(self.state.average, group, spec, origin=origin)
                right, asked = right + some[0], asked + some[1]
                wrong += some[2]
        table = self.tokenizer.token_bytes
        return {
            "exact": round(sum(right.values()) / sum(asked.values()), 4),
            "kinds": {kind: f"{right[kind]}/{asked[kind]}" for kind in sorted(asked)},
            "wrong": [(q, a, table.join(ids).decode(errors="replace")) for q, a, ids in wrong[:8]],
        }

    def _log(self, stage: Stage, numbers: dict[str, Any]) -> None:
        line = {
            "stage": stage.name,
            "step": self.state.step,
            "seconds": round(self.state.seconds),
            **{k: round(v, 5) if isinstance(v, float) else v for k, v in numbers.items()},
        }
        text = json.dumps(line)
        print(text, flush=True)  # noqa: T201
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def _save(self) -> None:
        """Atomically: a killed run leaves the last complete state."""
        import torch

        state = self.state
        plain = asdict(
            State(state.stage, state.step, state.seconds, state.tokens, {}, {}),
        ) | {
            "weights": {name: tensor.detach() for name, tensor in state.weights.items()},
            "average": state.average,
            "optimizer": state.optimizer,
        }
        temporary = self.directory / "state.pt.tmp"
        torch.save(plain, temporary)
        os.replace(temporary, self.directory / "state.pt")


def _means(dicts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for numbers in dicts for name in numbers)
    return {
        name: sum(d[name] for d in dicts if name in d) / sum(name in d for d in dicts)
        for name in names
    }


def draw_rows(seed: str, stage: Stage, tokenizer: Tokenizer, spec: ModelSpec) -> list[Encoded]:
    """The rows of one step: the same for the same seed and stage."""
    rng = random.Random(seed)
    rows = []
    tiles = 0.0
    for kind in _kinds(rng, stage):
        example = some_branches(rng, make_example(rng, kind, tile_size=stage.tile_size))
        if not stage.has_dialogues:
            example = replace(example, branches=())
        rows.append(
            encode_example(
                example,
                tokenizer=tokenizer,
                spec=spec,
                bos=rng.random() < 0.5,
                labels=stage.has_labels,
                rng=rng,
            )
        )
        tiles += max(0.5, len(rows[-1].tiles))
        if tiles >= stage.tiles_per_step:
            return rows
    raise AssertionError("the kinds never end")


def _kinds(rng: random.Random, stage: Stage) -> Iterator[str]:
    while True:
        yield rng.choices(list(stage.mix), list(stage.mix.values()))[0]


def _heads(seed: int) -> Weights:
    """What only the training reads: see `dense_loss` and `answer_loss`."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    return {
        "dense.weight": torch.randn(DENSE_OUTPUTS, 256, generator=generator) * 0.06,
        "dense.bias": torch.zeros(DENSE_OUTPUTS),
        **{
            f"word.{layer}.weight": torch.randn(WORD_OUTPUTS, 256, generator=generator) * 0.06
            for layer in WORD_LAYERS
        },
        **{
            f"source.{layer}.weight": torch.randn(SOURCE_OUTPUTS, 256, generator=generator) * 0.06
            for layer in SOURCE_LAYERS
        },
    }


def _optimizers(weights: Weights, stage: Stage) -> dict[str, Any]:
    """What learns in this stage: matrices by Muon, embeddings, heads and the rest by AdamW."""
    import torch

    learning = {name: tensor for name, tensor in weights.items() if stage.teaches(name)}
    matrices = {
        name: tensor
        for name, tensor in learning.items()
        if tensor.ndim == 2 and not name.startswith(_BY_ADAMW)
    }
    others = [tensor for name, tensor in learning.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, 0.0, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    return {"adamw": adamw} | (
        {"muon": Muon(matrices.values(), 0.0, weight_decay=stage.decay)} if matrices else {}
    )


def _window_origin(seed: str, stage: Stage, spec: ModelSpec) -> tuple[int, int]:
    """Where a small tile lies in a tile of 448 pixels: even patches, as tokens are 2 x 2.

    Anywhere while the tower learns. In the middle while the language model does: then it can begin
    with where a thing is, before it compares that with where it was or where another one is.
    """
    free = _PATCHES_PER_SIDE - spec.vision.patches_per_side
    if stage.learns == "language":
        return free // 4 * 2, free // 4 * 2
    rng = random.Random(f"window/{seed}")
    return rng.randrange(0, free + 1, 2), rng.randrange(0, free + 1, 2)
