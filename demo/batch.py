"""Rows of about the same length as one batch of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demo.encoding import BOS, IGNORE, Encoded
from demo.scene import COLORS, DIRECTIONS, KINDS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SUBJECTS", "Batch", "collate", "split_by_length", "subjects"]

_DIGITS = list("0123456789")
# What an answer can name: how it stands there, and the names.
SUBJECTS: tuple[tuple[str, list[str]], ...] = (
    (rf"\b({'|'.join(COLORS)})\b", list(COLORS)),
    (rf"\b({'|'.join(KINDS)})\b", list(KINDS)),
    (rf"moves ({'|'.join(DIRECTIONS)})", list(DIRECTIONS)),
    (r"\b(\d)\d\b", _DIGITS),
    (r"\b\d(\d)\b", _DIGITS),
    (r"^Image-(\d)\.", ["1", "2"]),
)


@dataclass(frozen=True)
class Batch:
    """tiles: uint8 (num_tiles, size, size, 3). Dense labels: see `TileLabels`.

    ids, positions, labels: int64 (rows, length); in ids, vocab_size + k is the k-th visual token
    of the whole batch. mask: bool (rows, 1, length, length).
    words: int64 (n, 2), row and place of each of the answers' `words`; subjects: int64
    (n, len(SUBJECTS)), what should be known there, IGNORE where the text does not say it; named:
    float32 (n, len(COLORS)), 1 for every colour in the text.
    sources: int64 (rows, length, 3), see `Encoded`.
    """

    tiles: Tensor
    color: Tensor
    kind: Tensor
    digit: Tensor
    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    words: Tensor
    subjects: Tensor
    named: Tensor
    sources: Tensor


def collate(rows: Sequence[Encoded], *, vocab_size: int) -> Batch:
    """Rows padded at their end to the longest."""
    import torch

    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        arrays = [getattr(row, name) for row in rows]
        out = np.full((len(rows), length, *arrays[0].shape[1:]), fill, np.int64)
        for index, values in enumerate(arrays):
            out[index, : len(values)] = values
        return torch.from_numpy(out)

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(row.tile_labels, name) for row in rows]))

    ids, segments = padded("ids", BOS), padded("segments", -1)
    tokens = [row.tile_labels.color.size for row in rows]  # one label for every visual token
    first = torch.tensor([0, *np.cumsum(tokens)[:-1]])[:, None]
    ids = torch.where(ids >= vocab_size, ids + first, ids)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    words = [(n, *word) for n, row in enumerate(rows) for a in row.answers for word in a.words]
    looking, seen = segments[:, :, None], segments[:, None, :]
    return Batch(
        tiles=torch.from_numpy(np.concatenate([row.tiles for row in rows])),
        color=joined("color"),
        kind=joined("kind"),
        digit=joined("digit"),
        ids=ids,
        positions=padded("positions", 0),
        labels=padded("labels", IGNORE),
        mask=(causal & ((seen == 0) | (seen == looking)))[:, None],
        words=torch.tensor([(n, place) for n, place, _ in words]).view(-1, 2),
        subjects=torch.tensor([subjects(text) for *_, text in words]).view(-1, len(SUBJECTS)),
        named=torch.tensor([[float(color in text) for color in COLORS] for *_, text in words]).view(
            -1, len(COLORS)
        ),
        sources=padded("sources", IGNORE),
    )


def subjects(text: str) -> list[int]:
    """Of each of SUBJECTS the index of the first that the text names, IGNORE without one."""
    found = []
    for pattern, names in SUBJECTS:
        match = re.search(pattern, text)
        found.append(names.index(match[1]) if match else IGNORE)
    return found


def split_by_length(
    rows: Sequence[Encoded], *, max_tiles: int, max_waste: float = 1.3
) -> list[list[Encoded]]:
    """Groups of at most max_tiles tiles whose longest row is at most max_waste times any other."""
    groups: list[list[Encoded]] = []
    tiles = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        fits = groups and tiles + len(row.tiles) <= max_tiles
        if not fits or len(row.ids) > max_waste * len(groups[-1][0].ids):
            groups.append([])
            tiles = 0
        groups[-1].append(row)
        tiles += len(row.tiles)
    return groups
