"""What the training minimises: the answers' tokens, and what every visual token shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from demo.batch import SUBJECTS, Batch, collate
from demo.drawing import DIGITS
from demo.encoding import BOS, IGNORE, Encoded
from demo.model import Weights, all_hidden_states, visual_features
from demo.scene import COLORS, KINDS
from internvl_triton.model_spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DENSE_OUTPUTS",
    "SOURCE_LAYERS",
    "SOURCE_OUTPUTS",
    "WORD_LAYERS",
    "WORD_OUTPUTS",
    "answer_logits",
    "answer_loss",
    "count_exact",
    "dense_loss",
    "embed",
]

# Of a place at one end of the tile, in the unit of the features. Colours differ by about 30; places
# that were 60 times quieter were never heard by the language model.
_LOUDNESS = 24.0
_TOKENS_PER_SIDE = 16  # of a tile of 448 pixels
_COLORS, _KINDS, _DIGITS = 1 + len(COLORS), 1 + len(KINDS), 4 * (1 + len(DIGITS))
# colour, kind, and a digit for each of the token's four patches
DENSE_OUTPUTS = _COLORS + _KINDS + _DIGITS
_SUBJECT_SIZES = [len(names) for _, names in SUBJECTS]
WORD_OUTPUTS = sum(_SUBJECT_SIZES) + len(COLORS)
WORD_LAYERS = (0, 1, 2)
_MOST_SOURCES = 8  # images, frames or tiles that are told apart; directions are fewer
SOURCE_OUTPUTS = 3 * _MOST_SOURCES
SOURCE_LAYERS = (0, 1)


def embed(weights: Weights, ids: Tensor, features: Tensor) -> Tensor:
    """float32 (rows, length, hidden). Ids past the vocabulary are rows of `features`.

    BOS is the zero vector: without biases it stays zero in every layer.
    """
    import torch

    table = weights["language_model.model.embed_tokens.weight"]
    zero = table.new_zeros(1, table.shape[1])
    everything = torch.cat([table, features.reshape(-1, table.shape[1]), zero])
    last = len(everything) - 1
    index = torch.where(ids == BOS, last, ids)
    return everything[index]


def answer_logits(
    weights: Weights, batch: Batch, features: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor]:
    """Logits (n, vocab) and labels (n,) at the places that belong to answers, row by row."""
    return _answer_logits(weights, batch, _states(weights, batch, features, spec)[-1])


def _states(weights: Weights, batch: Batch, features: Tensor, spec: ModelSpec) -> list[Tensor]:
    embeddings = embed(weights, batch.ids, features)
    return all_hidden_states(weights, embeddings, batch.positions, batch.mask, spec.llm)


def _answer_logits(weights: Weights, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn import functional

    asked = batch.labels != IGNORE
    head = weights["language_model.lm_head.weight"]
    return functional.linear(hidden[asked], head), batch.labels[asked]


def answer_loss(
    weights: Weights, batch: Batch, features: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross entropies of all answer tokens; that of the words; mean of the sources'.

    Words: the one that a question is about ("red", "left") must know behind the first layers what
    the answer will name, read linearly; see `Answer.words`. So the look at the picture is learned
    before, and without, the way from there to the answer. Sources: every visual token must know
    which image, frame and tile it is from, and how its clip moves; see `Encoded.sources`.
    """
    from torch.nn import functional

    states = _states(weights, batch, features, spec)
    logits, labels = _answer_logits(weights, batch, states[-1])
    return (
        functional.cross_entropy(logits, labels, reduction="sum"),
        _words_loss(weights, batch, states),
        _sources_loss(weights, batch, states),
    )


def _words_loss(weights: Weights, batch: Batch, states: list[Tensor]) -> Tensor:
    from torch.nn import functional

    rows, places = batch.words.unbind(-1)
    loss = states[0].new_zeros(())
    for layer in WORD_LAYERS:
        read = functional.linear(states[layer][rows, places], weights[f"word.{layer}.weight"])
        *subjects, named = read.split([*_SUBJECT_SIZES, len(COLORS)], -1)
        for number, outputs in enumerate(subjects):
            loss = loss + functional.cross_entropy(
                outputs, batch.subjects[:, number], reduction="sum", ignore_index=IGNORE
            )
        loss = loss + functional.binary_cross_entropy_with_logits(
            named, batch.named, reduction="sum"
        )
    return loss


def _sources_loss(weights: Weights, batch: Batch, states: list[Tensor]) -> Tensor:
    """Mean over the visual tokens of each column of `sources`, summed."""
    from torch.nn import functional

    visual = (batch.sources != IGNORE).any(-1)
    labels = batch.sources[visual]
    labels = labels.where(labels < _MOST_SOURCES, IGNORE)
    loss = states[0].new_zeros(())
    for layer in SOURCE_LAYERS:
        read = functional.linear(states[layer][visual], weights[f"source.{layer}.weight"])
        for outputs, column in zip(read.split(_MOST_SOURCES, -1), labels.T, strict=True):
            if (column != IGNORE).any():
                loss = loss + functional.cross_entropy(outputs, column, ignore_index=IGNORE)
    return loss


def dense_loss(
    head: Weights, batch: Batch, features: Tensor, *, origin: tuple[int, int] = (0, 0)
) -> tuple[Tensor, dict[str, float]]:
    """Mean loss of a linear reading of every visual token, and its accuracy on foreground.

    place: root mean square error of the places, in widths of a tile. origin: see
    `visual_features`.
    """
    import torch
    from torch.nn import functional

    outputs = functional.linear(features, head["dense.weight"], head["dense.bias"])
    color, kind, digit = outputs.split([_COLORS, _KINDS, _DIGITS], -1)
    digit = digit.unflatten(-1, (4, 1 + len(DIGITS)))
    loss = outputs.new_zeros(())
    accuracy = {}
    # Digits are the last to be learned and the fewest: they count double, their background little.
    for name, logits, labels, background, importance in (
        ("color", color, batch.color, 0.3, 1.0),
        ("kind", kind, batch.kind, 0.3, 1.0),
        ("digit", digit, batch.digit, 0.05, 2.0),
    ):
        class_weights = torch.ones(logits.shape[-1])
        class_weights[0] = background
        loss = loss + importance * functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), weight=class_weights, ignore_index=IGNORE
        )
        shown = labels > 0
        if shown.any():
            accuracy[name] = (logits[shown].argmax(-1) == labels[shown]).float().mean().item()
    errors = _place_errors(batch, features, origin)
    accuracy["place"] = errors.item() ** 0.5
    return loss + 40 * errors, accuracy


def _place_errors(batch: Batch, features: Tensor, origin: tuple[int, int]) -> Tensor:
    """Mean square error of the first eight features, in widths of a tile.

    They should say how far a shape is from the tile's left, right, top and bottom edge, then the
    same of a digit, and be zero on everything else: so the leftmost shape is simply where one
    number is largest.
    """
    import torch

    side = round(features.shape[1] ** 0.5)
    rows, columns = ((torch.arange(side) + 0.5 + first / 2) / _TOKENS_PER_SIDE for first in origin)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x, 1 - x, y, 1 - y], -1).flatten(0, 1)
    errors, counted = features.new_zeros(()), 0
    for number, labels in enumerate((batch.color[..., None], batch.digit)):
        found = features[..., 4 * number : 4 * number + 4] / _LOUDNESS
        shown, unsure = (labels > 0).any(-1), (labels == IGNORE).any(-1)
        squares = (found - places * shown[..., None]).square().mean(-1)
        for part in (shown, ~shown & ~unsure):  # foreground is rare, and counts as much
            if part.any():
                errors, counted = errors + squares[part].mean(), counted + 1
    return errors / max(1, counted)


def count_exact(
    weights: Weights, rows: Sequence[Encoded], spec: ModelSpec, *, origin: tuple[int, int] = (0, 0)
) -> tuple[Counter[str], Counter[str], list[tuple[str, str, list[int]]]]:
    """Right and asked answers by kind, and the wrong ones as (question, answer, given ids).

    A greedy answer is exact if and only if every token of the right answer is the most likely
    one after the right tokens before it, so one pass without generation decides. origin: see
    `visual_features`.
    """
    import torch

    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong: list[tuple[str, str, list[int]]] = []
    if not any(row.answers for row in rows):
        return right, asked, wrong
    with torch.no_grad():
        batch = collate(rows, vocab_size=spec.llm.vocab_size)
        features = visual_features(weights, batch.tiles, spec, origin=origin)
        logits, labels = answer_logits(weights, batch, features, spec)
        best = logits.argmax(-1)
    begin = 0
    for row in rows:
        # Answers lie in the row in the order of `answers`.
        for answer in row.answers:
            end = begin + answer.end - answer.begin
            asked[answer.kind] += 1
            if bool((best[begin:end] == labels[begin:end]).all()):
                right[answer.kind] += 1
            else:
                wrong.append((answer.question, answer.text, best[begin : end - 1].tolist()))
            begin = end
    return right, asked, wrong
