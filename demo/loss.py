"""What the training minimises: the answers' tokens, and what every visual token shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from demo.batch import Batch, collate
from demo.encoding import BOS, IGNORE, Encoded
from demo.model import Weights, hidden_states, visual_features
from demo.scene import COLORS, KINDS
from internvl_triton.model_spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DENSE_OUTPUTS", "answer_logits", "answer_loss", "count_exact", "dense_loss", "embed"]

_LOUDNESS = 8.0  # between the tile's two ends, in the unit of the features
_PLACES = 4
_TOKENS_PER_SIDE = 16  # of a tile of 448 pixels
_COLORS, _KINDS, _DIGITS = 1 + len(COLORS), 1 + len(KINDS), 4 * 11
# colour, kind, a digit for each of the token's four patches, and the place of what it shows
DENSE_OUTPUTS = _COLORS + _KINDS + _DIGITS + _PLACES


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
    from torch.nn import functional

    embeddings = embed(weights, batch.ids, features)
    hidden = hidden_states(weights, embeddings, batch.positions, batch.mask, spec.llm)
    asked = batch.labels != IGNORE
    head = weights["language_model.lm_head.weight"]
    return functional.linear(hidden[asked], head), batch.labels[asked]


def answer_loss(weights: Weights, batch: Batch, features: Tensor, spec: ModelSpec) -> Tensor:
    """Sum of the cross entropies of all answer tokens."""
    from torch.nn import functional

    logits, labels = answer_logits(weights, batch, features, spec)
    return functional.cross_entropy(logits, labels, reduction="sum")


def dense_loss(
    head: Weights, batch: Batch, features: Tensor, *, origin: tuple[int, int] = (0, 0)
) -> tuple[Tensor, dict[str, float]]:
    """Mean loss of a linear reading of every visual token, and its accuracy on foreground.

    origin: see `visual_features`.
    """
    import torch
    from torch.nn import functional

    outputs = functional.linear(features, head["dense.weight"], head["dense.bias"])
    color, kind, digit, _ = outputs.split([_COLORS, _KINDS, _DIGITS, _PLACES], -1)
    digit = digit.unflatten(-1, (4, 11))
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
    return loss + _place_loss(head, batch, features, origin), accuracy


def _place_loss(head: Weights, batch: Batch, features: Tensor, origin: tuple[int, int]) -> Tensor:
    """How far foreground is from the tile's left, right, top and bottom edge, in the features.

    It is read along directions of length 1, so that a place is as loud as a colour, and it is zero
    on the background: the leftmost shape is simply where one number is largest.
    """
    import torch
    from torch.nn import functional

    side = round(features.shape[1] ** 0.5)
    rows, columns = ((torch.arange(side) + 0.5 + first / 2) / _TOKENS_PER_SIDE for first in origin)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x, 1 - x, y, 1 - y], -1).flatten(0, 1)
    labels = torch.cat([batch.color[..., None], batch.digit], -1)
    shown, unsure = (labels > 0).any(-1), (labels == IGNORE).any(-1)
    wanted = _LOUDNESS * places * shown[..., None]
    directions = functional.normalize(head["dense.weight"][-_PLACES:], dim=1)
    found = functional.linear(features, directions, head["dense.bias"][-_PLACES:])
    errors = (found - wanted).square().mean(-1)
    background = ~shown & ~unsure
    return 0.1 * sum(
        (errors[mask].mean() for mask in (shown, background) if mask.any()), errors.new_zeros(())
    )


def count_exact(
    weights: Weights, rows: Sequence[Encoded], spec: ModelSpec
) -> tuple[Counter[str], Counter[str], list[tuple[str, str, list[int]]]]:
    """Right and asked answers by kind, and the wrong ones as (question, answer, given ids).

    A greedy answer is exact if and only if every token of the right answer is the most likely
    one after the right tokens before it, so one pass without generation decides.
    """
    import torch

    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong: list[tuple[str, str, list[int]]] = []
    if not any(row.answers for row in rows):
        return right, asked, wrong
    with torch.no_grad():
        batch = collate(rows, vocab_size=spec.llm.vocab_size)
        features = visual_features(weights, batch.tiles, spec)
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
