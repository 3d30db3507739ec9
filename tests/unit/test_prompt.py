"""Prompt ids against the reference template: one string, special tokens found in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from internvl_triton.errors import ForbiddenToken
from internvl_triton.messages import parse_conversation
from internvl_triton.model_spec import ModelSpec
from internvl_triton.prompt import ImageRef, Prompt, Visual, build_prompt
from internvl_triton.tokenizer import Tokenizer
from tests.reference import reference_ids, reference_prompt

QUESTIONS = [
    "Please describe the image shortly.",
    "\n\n  two   spaces, a tab\t and\r\nline ends \n",
    "数一数图片里有几个圆形? émigré naïve 👩‍👩‍👧 Ω",
    "1234567890 don't we'll I'M   <b>bold</b> </b> a<b <im_end> <|im_ end|>",
    "Where is <ref>the red circle</ref>? <box>[[1, 2, 3, 4]]</box> <quad></quad>",
    "e\u0301 decomposed",
]


def prompt_of(
    spec: ModelSpec,
    tokenizer: Tokenizer,
    text: str | None = None,
    messages: list[dict] | None = None,
    tiles: tuple[int, ...] = (),
    tokens_per_tile: int | None = None,
) -> Prompt:
    conversation = parse_conversation(
        text_input=text,
        messages=None if messages is None else json.dumps(messages),
        num_images=len(tiles),
        num_videos=0,
    )
    pictures = [Visual(count, (1000 + k, 0)) for k, count in enumerate(tiles)]
    visuals = [
        pictures[ref.index : ref.index + ref.count]
        for ref in conversation.media
        if isinstance(ref, ImageRef)
    ]
    return build_prompt(
        conversation,
        visuals,
        tokenizer=tokenizer,
        tokens_per_tile=tokens_per_tile or spec.tokens_per_tile,
        vocab_size=spec.llm.vocab_size,
    )


def with_context_ids(prompt: Prompt, spec: ModelSpec, tokenizer: Tokenizer) -> list[int]:
    """Virtual ids as the <IMG_CONTEXT> that the reference's prompt has in their place."""
    context = tokenizer.special_id("<IMG_CONTEXT>")
    return [context if i >= spec.llm.vocab_size else i for i in prompt.input_ids.tolist()]


@pytest.mark.parametrize("question", QUESTIONS)
def test_text_only(question: str, checkpoint: Path, spec, tokenizer) -> None:
    prompt = prompt_of(spec, tokenizer, question)
    assert prompt.input_ids.tolist() == reference_ids(checkpoint, reference_prompt([], question))
    assert not prompt.prompt_table_extra_ids.any()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("num_tiles", [1, 13])
def test_one_image(question: str, num_tiles: int, checkpoint: Path, spec, tokenizer) -> None:
    prompt = prompt_of(spec, tokenizer, question, tiles=(num_tiles,))
    reference = reference_prompt([], "<image>\n" + question, [num_tiles])
    assert with_context_ids(prompt, spec, tokenizer) == reference_ids(checkpoint, reference)
    assert prompt.num_visual_tokens == 256 * num_tiles


def test_three_images_in_two_turns(checkpoint: Path, spec, tokenizer) -> None:
    first = "Image-1: <image>\nImage-2: <image>\nImage-3: <image>\nDescribe the three images."
    prompt = prompt_of(
        spec,
        tokenizer,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image"}] * 3
                + [{"type": "text", "text": "Describe the three images."}],
            },
            {"role": "assistant", "content": "Three circles."},
            {"role": "user", "content": "What do they have in common?"},
        ],
        tiles=(3, 1, 7),
    )
    reference = reference_prompt(
        [(first, "Three circles.")], "What do they have in common?", [3, 1, 7]
    )
    assert with_context_ids(prompt, spec, tokenizer) == reference_ids(checkpoint, reference)


def test_placeholders_stay_where_the_caller_put_them(checkpoint: Path, spec, tokenizer) -> None:
    question = "Is <image>  the same as<image>?"
    prompt = prompt_of(spec, tokenizer, question, tiles=(1, 3))
    reference = reference_prompt([], question, [1, 3])
    assert with_context_ids(prompt, spec, tokenizer) == reference_ids(checkpoint, reference)


def test_combined_pictures_share_one_place(checkpoint: Path, spec, tokenizer) -> None:
    """chat() without num_patches_list: all tiles at the one `<image>`."""
    question = "<image>\nDescribe the two images in detail."
    prompt = prompt_of(spec, tokenizer, question, tiles=(3, 7))
    reference = reference_prompt([], question, [10])
    assert with_context_ids(prompt, spec, tokenizer) == reference_ids(checkpoint, reference)
    extra = prompt.prompt_table_extra_ids[prompt.input_ids >= spec.llm.vocab_size]
    np.testing.assert_array_equal(extra, np.repeat([1000, 1001], [768, 1792]))


def test_only_internlm2_begins_with_bos(family: str, spec, tokenizer) -> None:
    ids = prompt_of(spec, tokenizer, "Hi").input_ids.tolist()
    start = tokenizer.special_id("<|im_start|>")
    assert ids[:2] == [1, start] if family == "internlm2" else ids[0] == start
    assert ids.count(1) == (1 if family == "internlm2" else ids.count(1))


def test_virtual_ids_run_over_all_images_and_carry_their_hash(spec, tokenizer) -> None:
    prompt = prompt_of(spec, tokenizer, "Hi", tiles=(1, 2), tokens_per_tile=4)
    visual = prompt.input_ids >= spec.llm.vocab_size
    expected = spec.llm.vocab_size + np.arange(12)
    np.testing.assert_array_equal(prompt.input_ids[visual], expected)
    np.testing.assert_array_equal(prompt.prompt_table_extra_ids[visual], [1000] * 4 + [1001] * 8)
    assert not prompt.prompt_table_extra_ids[~visual].any()
    assert len(prompt.prompt_table_extra_ids) == len(prompt.input_ids)


def test_a_longer_conversation_keeps_its_prefix(spec, tokenizer) -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]}
    short = prompt_of(spec, tokenizer, messages=[turn], tiles=(1,))
    answered = [turn, {"role": "assistant", "content": "Yes."}, turn]
    long = prompt_of(spec, tokenizer, messages=answered, tiles=(1, 1))
    n = len(short.input_ids)
    np.testing.assert_array_equal(long.input_ids[:n], short.input_ids)
    np.testing.assert_array_equal(long.prompt_table_extra_ids[:n], short.prompt_table_extra_ids)


@pytest.mark.parametrize(
    "token", ["<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>", "<img>", "</img>"]
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_cannot_hold_a_token_of_the_template(token, role, spec, tokenizer) -> None:
    texts = {"system": "s", "user": "u", "assistant": "a"} | {role: f"x{token}y"}
    messages = [{"role": name, "content": text} for name, text in texts.items()]
    messages.append({"role": "user", "content": "z"})
    with pytest.raises(ForbiddenToken, match="marks turns and pictures"):
        prompt_of(spec, tokenizer, messages=messages)


def test_an_unused_piece_of_sentencepiece_cannot_end_a_turn(checkpoints) -> None:
    from internvl_triton.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoints["internlm2"])
    with pytest.raises(ForbiddenToken, match=r"special token '<\|im_end\|>'"):
        tokenizer.encode("x [UNUSED_TOKEN_145]\n y")


@pytest.mark.parametrize("text", ["<s> struck </s>", "<|endoftext|>", "<unk>", "<|plugin|>"])
def test_other_special_spellings_stay_plain_text(text: str, tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes.join(ids).decode() == text
    assert len(ids) > 2


def test_video_frames_as_the_inference_code_writes_them(checkpoint: Path, spec, tokenizer) -> None:
    conversation = parse_conversation(
        text_input="What moves?", messages=None, num_images=0, num_videos=1
    )
    prompt = build_prompt(
        conversation,
        [[Visual(1, (k + 1, 0)) for k in range(8)]],
        tokenizer=tokenizer,
        tokens_per_tile=spec.tokens_per_tile,
        vocab_size=spec.llm.vocab_size,
    )
    # not the "Frame-1: " of training data
    question = "".join(f"Frame{k}: <image>\n" for k in range(1, 9)) + "What moves?"
    reference = reference_prompt([], question, [1] * 8)
    assert with_context_ids(prompt, spec, tokenizer) == reference_ids(checkpoint, reference)


def test_an_answer_ends_at_im_end(family: str, tokenizer: Tokenizer) -> None:
    """Not at llm_config.eos_token_id, which is `</s>` for InternLM2."""
    assert tokenizer.end_id == tokenizer.special_id("<|im_end|>")
    if family == "internlm2":
        assert tokenizer.end_id != tokenizer.special_id("</s>")


def test_an_own_system_message_can_be_empty(checkpoint: Path, spec, tokenizer) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    prompt = prompt_of(spec, tokenizer, messages=messages)
    reference = reference_prompt([], "Hi", system="")
    assert prompt.input_ids.tolist() == reference_ids(checkpoint, reference)
