"""The demo's expected answer, computed by the independent reference.

    python -m tests.demo_reference        # writes clients/samples/shapes.json

Prompt string, tiles and logits are the reference's own; nothing of the project's engines runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.oracle import Oracle
from tests.reference import reference_ids, reference_prompt, reference_tiles

IMAGE = "shapes.jpg"
PROMPT = "What is in the picture?"
MAX_TOKENS = 32
SAMPLES = Path(__file__).resolve().parents[1] / "clients" / "samples"


def demo_reference(checkpoint: Path) -> tuple[dict[str, object], float]:
    """The content of shapes.json, and the smallest logit margin along the answer."""
    import transformers

    tiles = reference_tiles(Image.open(SAMPLES / IMAGE))
    prompt = reference_prompt([], f"<image>\n{PROMPT}", [len(tiles)])
    ids = reference_ids(checkpoint, prompt)
    answer, margin = Oracle(checkpoint).greedy_with_margin(ids, tiles, MAX_TOKENS)
    source = f"InternVLForConditionalGeneration of transformers {transformers.__version__}, fp32"
    return {
        "source": source,
        "image": IMAGE,
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "token_ids": answer,
    }, margin


def main() -> None:
    import tempfile

    from build.demo_checkpoint import DEMO, demo_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        content, margin = demo_reference(demo_checkpoint(DEMO, Path(scratch) / "demo"))
    (SAMPLES / "shapes.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote shapes.json; smallest margin {margin:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
