"""The comparisons of a certificate: what was measured, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from build.parity.engine_outputs import EngineOutput, compared_positions
from build.parity.model_card import (
    find_closest_aspect_ratio,
    reference_ids,
    reference_prompt,
    reference_tiles,
)
from build.parity.port import Forward, Port
from build.parity.questions import Question
from internvl_triton.model_spec import ModelSpec
from internvl_triton.tiling import choose_grid

__all__ = ["Check", "Limits", "Reference", "compare", "information"]

Array = NDArray[np.float32]
GRID_SIDES = (1, 7, 100, 223, 224, 336, 447, 448, 449, 640, 896, 1000, 1280, 1344, 1920, 4032)


@dataclass(frozen=True)
class Limits:
    """features: relative error of a tile's features, |ours - reference| / |reference|.
    logits: largest difference of a logit. Two runs whose logits are that close can choose
    different tokens only where the reference's best leads by less than twice as much.
    """

    features: float
    logits: float

    @classmethod
    def of(cls, profile: str) -> Limits:
        """cpu: both sides compute in fp32. gpu: bf16 engines; not measured on a GPU yet."""
        return cls(1e-4, 1e-3) if profile == "cpu" else cls(0.03, 0.25)


@dataclass(frozen=True)
class Check:
    """Passed if measured <= limit. Not a number never passes."""

    name: str
    meaning: str
    measured: float
    limit: float
    of: str = ""  # how much was compared

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit


@dataclass(frozen=True)
class Reference:
    """What the reference makes of one question: `input_ids` hold <IMG_CONTEXT> throughout."""

    tiles: NDArray[np.uint8]
    input_ids: list[int]
    forward: Forward

    @classmethod
    def of(
        cls,
        question: Question,
        answer: Sequence[int],
        *,
        checkpoint: Path,
        spec: ModelSpec,
        port: Port,
    ) -> Reference:
        """Model card preprocessing, the checkpoint's tokenizer and one pass over prompt + answer.

        One pass is enough for the greedy answer: if every token of the answer is the reference's
        own choice behind the tokens before it, then the answer is the reference's.
        """
        tiles = [
            reference_tiles(
                image,
                max_num=spec.max_tiles,
                image_size=spec.tile_size,
                use_thumbnail=spec.use_thumbnail,
            )
            for image in question.images
        ]
        prompt = reference_prompt(
            list(question.history),
            question.text,
            [len(part) for part in tiles],
            num_image_token=spec.tokens_per_tile,
            template=spec.template,
            system=spec.system_message,
        )
        ids = reference_ids(checkpoint, prompt)
        size = spec.tile_size
        stacked = np.concatenate([np.empty((0, size, size, 3), np.uint8), *tiles])
        positions = compared_positions(len(ids), len(answer))
        return cls(stacked, ids, port.forward(ids, answer[:-1], stacked, positions))


def compare(
    outputs: Sequence[EngineOutput],
    references: Sequence[Reference],
    *,
    spec: ModelSpec,
    reference_spec: ModelSpec,
    limits: Limits,
    image_token_id: int,
) -> list[Check]:
    """Every comparison of the artefacts with the reference, in the order of the pipeline.

    spec: what the artefacts say that the model is. reference_spec: what the checkpoint says.
    """
    pairs = list(zip(outputs, references, strict=True))
    checks = [
        _tile_grid(spec, reference_spec),
        _pixels(pairs),
        _token_ids(pairs, reference_spec.llm.vocab_size, image_token_id),
        _visual_features(pairs, reference_spec.tokens_per_tile, limits.features),
    ]
    if all(output.logits.size for output in outputs):
        checks.append(_logits(pairs, limits.logits))
    return [*checks, _greedy_agreement(pairs, limits.logits)]


def information(
    outputs: Sequence[EngineOutput],
    references: Sequence[Reference],
    unquantised: Sequence[Reference] | None,
) -> dict[str, str]:
    """What is worth knowing and has no limit.

    unquantised: of the checkpoint's own weights, where `references` are of quantised ones.
    """
    facts = {"tokens chosen exactly like the reference": _same_choices(outputs, references)}
    if unquantised is not None:
        facts["tokens chosen like the unquantised checkpoint"] = _same_choices(outputs, unquantised)
        pairs = list(zip(references, unquantised, strict=True))
        error = [_centred(a.forward.logits) - _centred(b.forward.logits) for a, b in pairs]
        rms = np.sqrt(np.mean(np.square(np.concatenate(error))))
        facts["logits: rms difference that quantisation makes"] = f"{rms:.4f}"
    return facts


def _tile_grid(ours: ModelSpec, theirs: ModelSpec) -> Check:
    sizes = [(width, height) for width in GRID_SIDES for height in GRID_SIDES]
    different = sum(
        (grid.columns, grid.rows)
        != find_closest_aspect_ratio(*size, max_num=theirs.max_tiles, image_size=theirs.tile_size)
        for size in sizes
        if (grid := choose_grid(*size, max_tiles=ours.max_tiles, tile_size=ours.tile_size))
    )
    return Check(
        "tile grid",
        "picture sizes with another grid of tiles than the model card's code chooses",
        different,
        0,
        f"{len(sizes)} sizes",
    )


def _pixels(pairs: Sequence[tuple[EngineOutput, Reference]]) -> Check:
    measured = max(_largest_difference(ours.tiles, theirs.tiles) for ours, theirs in pairs)
    return Check(
        "pixels",
        "largest difference of a tile's pixel from the model card's code with PIL, of 255",
        measured,
        0,
        f"{sum(len(theirs.tiles) for _, theirs in pairs)} tiles",
    )


def _token_ids(
    pairs: Sequence[tuple[EngineOutput, Reference]], vocab_size: int, image_token_id: int
) -> Check:
    """Visual tokens count as right if they select the rows 0, 1, 2 ... of the prompt table."""
    different = 0
    for ours, theirs in pairs:
        expected = np.array(theirs.input_ids)
        visual = expected == image_token_id
        expected[visual] = vocab_size + np.arange(visual.sum())
        common = min(len(expected), len(ours.input_ids))
        different += int((expected[:common] != ours.input_ids[:common]).sum())
        different += max(len(expected), len(ours.input_ids)) - common
    return Check(
        "token ids",
        "positions whose token is another one than the checkpoint's tokenizer and template give",
        different,
        0,
        f"{sum(len(theirs.input_ids) for _, theirs in pairs)} tokens",
    )


def _visual_features(
    pairs: Sequence[tuple[EngineOutput, Reference]], tokens_per_tile: int, limit: float
) -> Check:
    errors = []
    for ours, theirs in pairs:
        expected = theirs.forward.features
        if expected is None:
            errors += [0.0 if not len(ours.features) else float("inf")]
        elif expected.shape != ours.features.shape:
            errors.append(float("inf"))
        else:
            shape = (-1, tokens_per_tile * expected.shape[1])
            difference = (ours.features - expected).reshape(shape)
            lengths = np.linalg.norm(expected.reshape(shape), axis=1)
            errors += (np.linalg.norm(difference, axis=1) / lengths).tolist()
    return Check(
        "visual features",
        "largest relative error of a tile's features behind the projector",
        _worst(errors),
        limit,
        f"{sum(len(theirs.tiles) for _, theirs in pairs)} tiles",
    )


def _logits(pairs: Sequence[tuple[EngineOutput, Reference]], limit: float) -> Check:
    errors = [_largest_difference(ours.logits, theirs.forward.logits) for ours, theirs in pairs]
    return Check(
        "logits",
        "largest difference of a logit, over prompts and answers, pictures included",
        _worst(errors),
        limit,
        f"{sum(len(theirs.forward.logits) for _, theirs in pairs)} positions of the whole "
        "vocabulary",
    )


def _greedy_agreement(pairs: Sequence[tuple[EngineOutput, Reference]], limit: float) -> Check:
    leads = []
    for ours, theirs in pairs:
        logits = theirs.forward.logits[-len(ours.answer) :]
        chosen = logits[np.arange(len(ours.answer)), ours.answer]
        leads += (logits.max(axis=1) - chosen).tolist()
    return Check(
        "greedy agreement",
        "largest lead, in logits, of the reference's own choice over the token that was served; "
        "0 where they are the same",
        _worst(leads),
        2 * limit,
        f"{len(leads)} tokens of {len(pairs)} answers",
    )


def _same_choices(outputs: Sequence[EngineOutput], references: Sequence[Reference]) -> str:
    same = total = 0
    for ours, theirs in zip(outputs, references, strict=True):
        choices = theirs.forward.logits[-len(ours.answer) :].argmax(axis=1)
        same += int((choices == ours.answer).sum())
        total += len(ours.answer)
    return f"{same} of {total}"


def _largest_difference(ours: NDArray[np.generic], theirs: NDArray[np.generic]) -> float:
    """Infinity for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.size:
        return 0.0
    return float(np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max())


def _worst(values: Sequence[float]) -> float:
    """The largest, or infinity if one is not a number: `max` would overlook it."""
    return float(np.max(np.nan_to_num(np.array(values), nan=np.inf, posinf=np.inf)))


def _centred(logits: Array) -> Array:
    centred: Array = logits - logits.mean(axis=1, keepdims=True)
    return centred
