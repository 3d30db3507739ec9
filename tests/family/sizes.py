"""The published sizes as test parameters."""

from __future__ import annotations

import pytest

from internvl_triton.published_models import PUBLISHED_MODELS

TP_SIZES = dict.fromkeys(PUBLISHED_MODELS, (1, 2, 4, 8)) | {"InternVL2_5-1B": (1, 2)}


def sizes(*light: str, of: tuple[str, ...] = tuple(PUBLISHED_MODELS)) -> list[object]:
    """Every name of `of`; those that are not `light` only run in `make check-family`."""
    return [
        pytest.param(name, marks=() if name in light else pytest.mark.family, id=name[12:])
        for name in of
    ]


def splits(*light: tuple[str, int]) -> list[object]:
    """Every name with every TP that splits it, likewise."""
    return [
        pytest.param(
            name,
            tp_size,
            marks=() if (name, tp_size) in light else pytest.mark.family,
            id=f"{name[12:]}-tp{tp_size}",
        )
        for name, tp_sizes in TP_SIZES.items()
        for tp_size in tp_sizes
    ]
