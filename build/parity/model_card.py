"""The reference's preprocessing, transcribed from the model card and `internvl/conversation.py`.

Kept apart from the project's own code on purpose: it is what that code is compared with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "SYSTEM_MESSAGE",
    "find_closest_aspect_ratio",
    "reference_ids",
    "reference_prompt",
    "reference_tiles",
]

SYSTEM_MESSAGE = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: E501, RUF001

# template of config.json -> (system message, sep), of `internvl/conversation.py`
_INTERNVL2_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: E501, RUF001
_TEMPLATES = {
    "internvl2_5": (SYSTEM_MESSAGE, "<|im_end|>\n"),
    "Hermes-2": (_INTERNVL2_SYSTEM, "<|im_end|>"),
    "internlm2-chat": (_INTERNVL2_SYSTEM, "<|im_end|>"),
}


def find_closest_aspect_ratio(
    width: int, height: int, *, max_num: int = 12, image_size: int = 448
) -> tuple[int, int]:
    """(columns, rows) that `dynamic_preprocess` and its helper choose, with min_num 1."""
    aspect_ratio = width / height
    ratios = sorted(
        {
            (i, j)
            for n in range(1, max_num + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if 1 <= i * j <= max_num
        },
        key=lambda ratio: ratio[0] * ratio[1],
    )
    best, best_diff = (1, 1), float("inf")
    for ratio in ratios:
        diff = abs(aspect_ratio - ratio[0] / ratio[1])
        if diff < best_diff:
            best, best_diff = ratio, diff
        elif diff == best_diff and width * height > 0.5 * image_size**2 * ratio[0] * ratio[1]:
            best = ratio
    return best


def reference_pictures(
    image: Image.Image, *, max_num: int = 12, image_size: int = 448, use_thumbnail: bool = True
) -> list[Image.Image]:
    """`dynamic_preprocess` of the model card, transcribed: its tiles, image_size wide and high."""
    image = image.convert("RGB")
    best = find_closest_aspect_ratio(*image.size, max_num=max_num, image_size=image_size)
    target_width, target_height = image_size * best[0], image_size * best[1]
    resized = image.resize((target_width, target_height))
    tiles = []
    for i in range(best[0] * best[1]):
        column, row = i % (target_width // image_size), i // (target_width // image_size)
        box = (column * image_size, row * image_size)
        tiles.append(resized.crop((*box, box[0] + image_size, box[1] + image_size)))
    if use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((image_size, image_size)))
    return tiles


def reference_tiles(
    image: Image.Image, *, max_num: int = 12, image_size: int = 448, use_thumbnail: bool = True
) -> NDArray[np.uint8]:
    """The same as uint8 (num_tiles, image_size, image_size, 3)."""
    tiles = reference_pictures(
        image, max_num=max_num, image_size=image_size, use_thumbnail=use_thumbnail
    )
    return np.stack([np.asarray(tile) for tile in tiles])


def reference_prompt(
    history: list[tuple[str, str]],
    question: str,
    num_patches_list: Sequence[int] = (),
    *,
    num_image_token: int = 256,
    template: str = "internvl2_5",
    system: str | None = None,
) -> str:
    """The one string that `chat()` tokenizes, placeholders replaced left to right.

    system: None is the template's.
    """
    system_message, sep = _TEMPLATES[template]
    text = f"<|im_start|>system\n{system_message if system is None else system}{sep}"
    for asked, answered in history:
        text += f"<|im_start|>user\n{asked}{sep}<|im_start|>assistant\n{answered}{sep}"
    text += f"<|im_start|>user\n{question}{sep}<|im_start|>assistant\n"
    for num_patches in num_patches_list:
        tokens = "<img>" + "<IMG_CONTEXT>" * num_image_token * num_patches + "</img>"
        text = text.replace("<image>", tokens, 1)
    return text


def reference_ids(checkpoint: Path, text: str) -> list[int]:
    """What the slow tokenizers do: special tokens cut the text, each stretch is encoded alone.

    Qwen2: transformers' Qwen2Tokenizer on vocab.json and merges.txt. InternLM2: the SentencePiece
    model on every stretch, `<s>` in front.
    """
    if (checkpoint / "tokenizer.model").is_file():
        return _internlm2_ids(checkpoint, text)
    from transformers import Qwen2Tokenizer

    ids: list[int] = Qwen2Tokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    return ids


def _internlm2_ids(checkpoint: Path, text: str) -> list[int]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    added = {e["content"]: int(i) for i, e in config["added_tokens_decoder"].items()}
    pattern = "(" + "|".join(re.escape(token) for token in sorted(added, key=len)[::-1]) + ")"
    ids = [model.bos_id()]
    for stretch in re.split(pattern, text):
        if stretch in added:
            ids.append(added[stretch])
        elif stretch:
            ids += model.encode(stretch)
    return ids
