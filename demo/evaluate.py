"""How many answers are exactly right, by kind of question, on scenes never seen in training.

    python -m demo.evaluate --examples 1000

Runs the exported checkpoint (bfloat16 weights, float32 arithmetic) in the training's own model.
`make accuracy` asks the running service; both draw the same scenes.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from demo.dialogue import QUESTION_KINDS, Example, make_example
from demo.model import Weights

__all__ = ["evaluation_examples", "main", "read_weights"]

# So that every kind of question is asked often enough.
_SHARES = {
    "one_tile": 0.34,
    "two_tiles": 0.14,
    "small_print": 0.16,
    "two_images": 0.14,
    "clip": 0.12,
    "text": 0.05,
    "unknown": 0.05,
}


def evaluation_examples(count: int, *, seed: int = 0) -> Iterator[Example]:
    """`count` fresh examples at 448-pixel tiles; clips have four frames."""
    for index in range(count):
        rng = random.Random(f"evaluation/{seed}/{index}")
        kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        while True:
            example = make_example(rng, kind, tile_size=448)
            if example.media != "video" or len(example.scenes) == 4:
                break
        yield example


def read_weights(checkpoint: Path) -> Weights:
    """float32 weights of the exported checkpoint, Qwen2 layout."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


def evaluate(checkpoint: Path, count: int, *, seed: int, bos: bool) -> str:
    """A table of exact answers by kind, then some wrong ones. `bos`: as InternLM2 sees it."""
    from demo.batch import split_by_length
    from demo.encoding import encode_example
    from demo.loss import count_exact
    from internvl_triton.model_spec import ModelSpec
    from internvl_triton.tokenizer import load_tokenizer

    spec, tokenizer = ModelSpec.from_checkpoint(checkpoint), load_tokenizer(checkpoint)
    weights = read_weights(checkpoint)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong: list[str] = []
    waiting = []
    examples = list(evaluation_examples(count, seed=seed))
    for number, example in enumerate(examples, start=1):
        waiting.append(encode_example(example, tokenizer=tokenizer, spec=spec, bos=bos))
        if len(waiting) < 32 and number < len(examples):
            continue
        for group in split_by_length(waiting, max_tiles=8):
            some_right, some_asked, some_wrong = count_exact(weights, group, spec)
            right, asked = right + some_right, asked + some_asked
            for question, answer, ids in some_wrong:
                given = tokenizer.token_bytes.join(ids).decode(errors="replace")
                wrong.append(f"{question} -> {given!r}, right: {answer!r}")
        waiting = []
    lines = [_line("all", sum(right.values()), sum(asked.values()))]
    lines += [_line(kind, right[kind], asked[kind]) for kind in QUESTION_KINDS if asked[kind]]
    return "\n".join([*lines, "", *wrong[:30]])


def _line(name: str, right: int, asked: int) -> str:
    return f"{name:12} {right:6}/{asked:<6} {100 * right / asked:6.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    checkpoint = Path("artifacts/demo-training/checkpoint")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help=f"{checkpoint}")
    parser.add_argument("--examples", type=int, default=1000, help="pictures or clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bos", action="store_true", help="put <s> in front, as InternLM2 does")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    print(  # noqa: T201
        evaluate(arguments.checkpoint, arguments.examples, seed=arguments.seed, bos=arguments.bos)
    )


if __name__ == "__main__":
    main()
