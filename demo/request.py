"""An example's question as the service takes it: messages, encoded pictures, an encoded clip.

Everything is lossless, so the service sees the very pixels that `encode_example` describes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demo.dialogue import Branch, Example
from demo.drawing import draw_scene
from demo.scene import Scene

__all__ = ["ServiceRequest", "lossless_clip", "service_request"]

# The service takes the middles of equal parts of a clip: of this many equal frames it takes one.
_REPEATS = 8


@dataclass(frozen=True)
class ServiceRequest:
    """Inputs of the ensemble, by its names. `sampling_parameters` still wants max_tokens."""

    messages: str
    images: tuple[bytes, ...]
    videos: tuple[bytes, ...]
    sampling_parameters: dict[str, Any]


def service_request(example: Example, branch: Branch) -> ServiceRequest:
    """The last question of `branch`, with the earlier turns and their right answers."""
    is_video = example.media == "video"
    kind, count = ("video", 1) if is_video else ("image", len(example.scenes))
    messages: list[dict[str, Any]] = []
    for number, exchange in enumerate(branch):
        media = [{"type": kind}] * count if number == 0 else []
        text = {"type": "text", "text": exchange.question}
        messages.append({"role": "user", "content": [*media, text]})
        messages.append({"role": "assistant", "content": exchange.answer})
    return ServiceRequest(
        messages=json.dumps(messages[:-1]),
        images=() if is_video else tuple(_png(scene) for scene in example.scenes),
        videos=(lossless_clip(example.scenes),) if is_video else (),
        sampling_parameters={"num_frames": len(example.scenes)} if is_video else {},
    )


def lossless_clip(scenes: Sequence[Scene]) -> bytes:
    """An MP4 file of which the service takes exactly `scenes` when asked for len(scenes) frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=12)
        stream.width, stream.height, stream.pix_fmt = scenes[0].width, scenes[0].height, "rgb24"
        stream.options = {"crf": "0", "preset": "ultrafast"}
        for scene in scenes:
            pixels = np.asarray(draw_scene(scene))
            for _ in range(_REPEATS):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    draw_scene(scene).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
