"""The reference's preprocessing and prompts, which the project's own are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from build.parity.model_card import (
    SYSTEM_MESSAGE,
    reference_ids,
    reference_prompt,
    reference_tiles,
)

__all__ = [
    "SYSTEM_MESSAGE",
    "reference_frames",
    "reference_ids",
    "reference_prompt",
    "reference_tiles",
]


def reference_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """The frames that the model card's `get_index` takes of a clip, without a bound."""
    import av

    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate or 0)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    start, end = max(0, round(-100000 * fps)), min(round(100000 * fps), len(frames) - 1)
    size = float(end - start) / num_frames
    return [frames[int(start + (size / 2) + np.round(size * k))] for k in range(num_frames)]
