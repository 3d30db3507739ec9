"""A conversation to token ids, following the `internvl2_5` template of the reference.

The reference builds one string and lets the tokenizer find special tokens in it, so user text
can end a turn or take an image's place. Here special tokens come only from the template: text
between them is encoded on its own, exactly the stretches the reference's tokenizer would see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DEFAULT_SYSTEM_MESSAGE",
    "TEMPLATES",
    "Conversation",
    "ImageRef",
    "Part",
    "Prompt",
    "PromptTemplate",
    "PromptTokenizer",
    "Turn",
    "VideoRef",
    "Visual",
    "build_prompt",
]

# internvl/conversation.py, OpenGVLab/InternVL @ 2410d1d: internvl2_5, then InternVL2's
DEFAULT_SYSTEM_MESSAGE = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: E501, RUF001
_INTERNVL2_SYSTEM_MESSAGE = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: E501, RUF001
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TEMPLATE_TOKENS = (IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT)


@dataclass(frozen=True)
class PromptTemplate:
    """after_turn: plain text behind each <|im_end|>."""

    system_message: str
    after_turn: str


TEMPLATES = {
    "internvl2_5": PromptTemplate(DEFAULT_SYSTEM_MESSAGE, "\n"),
    "Hermes-2": PromptTemplate(_INTERNVL2_SYSTEM_MESSAGE, ""),
    "internlm2-chat": PromptTemplate(_INTERNVL2_SYSTEM_MESSAGE, ""),
}


class PromptTokenizer(Protocol):
    """What prompt building needs of a tokenizer."""

    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token of the template."""

    def special_id(self, token: str) -> int:
        """Id of one special token, such as "<|im_end|>"."""


@dataclass(frozen=True)
class ImageRef:
    """The place of one entry of `images`, counted from 0; or of several as one combined picture.

    Combined pictures stand between one `<img>` and `</img>`, tiles of one after those of the
    other: what the reference's `chat()` does with one `<image>` and the tiles of several pictures.
    """

    index: int
    count: int = 1


@dataclass(frozen=True)
class VideoRef:
    """The place of one entry of `videos`, counted from 0: `Frame1: <image>` and so on."""

    index: int


Part = str | ImageRef | VideoRef


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the last is the user's. `system` None means the template's own message."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def media(self) -> list[ImageRef | VideoRef]:
        """Pictures and videos in the order in which the prompt shows them."""
        return [part for turn in self.turns for part in turn.parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Visual:
    """One picture or video frame in prompt order.

    digest: 128-bit content hash of image bytes and tiling, as two uint64.
    """

    num_tiles: int
    digest: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """input_ids int32 (n,); prompt_table_extra_ids uint64 (n,), 0 on text."""

    input_ids: NDArray[np.int32]
    prompt_table_extra_ids: NDArray[np.uint64]
    num_visual_tokens: int


@dataclass(frozen=True)
class _Special:
    token: str


@dataclass(frozen=True)
class _VisualTokens:
    visual: Visual


_Piece = str | _Special | _VisualTokens


def build_prompt(
    conversation: Conversation,
    visuals: Sequence[Sequence[Visual]],
    *,
    tokenizer: PromptTokenizer,
    tokens_per_tile: int,
    vocab_size: int,
    template: str = "internvl2_5",
) -> Prompt:
    """Ids of the whole prompt, ending in the assistant's opening.

    visuals: for each entry of `conversation.media`, its pictures: one for an image, several for
    combined ones, one per frame for a video. Visual positions carry the virtual ids
    vocab_size + k, k running over all visual tokens of the request, and the picture's content
    hash as extra id.
    template: one of TEMPLATES.

    Raises ForbiddenToken when text spells a token of the template.
    """
    ids: list[int] = []
    extra_ids: list[int] = []
    num_visual_tokens = 0
    if tokenizer.bos_id is not None:
        ids.append(tokenizer.bos_id)
    for piece in _join_text(_pieces(conversation, visuals, TEMPLATES[template])):
        if isinstance(piece, str):
            ids += tokenizer.encode(piece)
        elif isinstance(piece, _Special):
            ids.append(tokenizer.special_id(piece.token))
        else:
            extra_ids += [0] * (len(ids) - len(extra_ids))
            count = piece.visual.num_tiles * tokens_per_tile
            first = vocab_size + num_visual_tokens
            ids += range(first, first + count)
            extra_ids += [piece.visual.digest[0] or 1] * count  # 0 would mean text
            num_visual_tokens += count
    extra_ids += [0] * (len(ids) - len(extra_ids))
    return Prompt(
        input_ids=np.array(ids, np.int32),
        prompt_table_extra_ids=np.array(extra_ids, np.uint64),
        num_visual_tokens=num_visual_tokens,
    )


def _pieces(
    conversation: Conversation, visuals: Sequence[Sequence[Visual]], template: PromptTemplate
) -> Iterable[_Piece]:
    system = conversation.system
    media = iter(visuals)
    yield _Special(IM_START)
    yield "system\n" + (template.system_message if system is None else system)
    yield _Special(IM_END)
    yield template.after_turn
    for turn in conversation.turns:
        yield _Special(IM_START)
        yield turn.role + "\n"
        for part in turn.parts:
            if isinstance(part, str):
                yield part
            elif isinstance(part, ImageRef):
                yield from _image(next(media))
            else:
                for number, visual in enumerate(next(media), start=1):
                    yield f"Frame{number}: "
                    yield from _image([visual])
                    yield "\n"
        yield _Special(IM_END)
        yield template.after_turn
    yield _Special(IM_START)
    yield "assistant\n"


def _image(visuals: Sequence[Visual]) -> Iterable[_Piece]:
    yield _Special(IMG_START)
    for visual in visuals:
        yield _VisualTokens(visual)
    yield _Special(IMG_END)


def _join_text(pieces: Iterable[_Piece]) -> Iterable[_Piece]:
    """Neighbouring texts as one: the tokenizer must see "user\\n" + question in one piece."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
            text = ""
        yield piece
    if text:
        yield text
