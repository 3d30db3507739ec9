"""The whole preprocessing step, without Triton."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import (
    ForbiddenToken,
    InvalidImage,
    InvalidRequest,
    InvalidSampling,
    RequestTooLong,
)
from internvl_triton.limits import Limits
from internvl_triton.llm_tensors import generation_request
from internvl_triton.preprocessing import Preprocessor, Request, stop_rule, word_list
from internvl_triton.stop_strings import StopRule
from tests.reference import reference_tiles
from tests.unit.test_media import clip


@pytest.fixture
def preprocess(spec, tokenizer) -> Preprocessor:
    return Preprocessor(spec, Limits.for_model(spec), tokenizer)


def png(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_every_output_of_the_contract_in_its_dtype(preprocess: Preprocessor) -> None:
    dtypes = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
    dtypes["UINT8"] = np.uint8
    for images in ([], [png(900, 450)]):
        arrays = preprocess(Request(text_input="Hi", images=images))
        guide = (contract.GUIDED_DECODING_GUIDE_TYPE.name, contract.GUIDED_DECODING_GUIDE.name)
        sent = [tensor for tensor in contract.PREPROCESSING.outputs if tensor.name not in guide]
        assert set(arrays) == {tensor.name for tensor in sent}
        for tensor in sent:
            array = arrays[tensor.name]
            assert array.dtype == dtypes[tensor.dtype], tensor.name
            assert array.ndim == len(tensor.dims), tensor.name
            for size, dim in zip(array.shape, tensor.dims, strict=True):
                assert dim in (-1, size), (tensor.name, array.shape)


def test_tiles_digests_and_ids_of_two_images(preprocess: Preprocessor, spec) -> None:
    first, second = png(900, 450, 1), png(300, 300, 2)
    arrays = preprocess(Request(text_input="Hi", images=[first, second, first]))
    assert arrays["tiles_per_image"].tolist() == [3, 1, 3]
    expected = np.concatenate(
        [reference_tiles(Image.open(io.BytesIO(data))) for data in (first, second, first)]
    )
    np.testing.assert_array_equal(arrays["tiles"], expected)
    digests = arrays["image_digests"]
    assert (digests[0] == digests[2]).all()
    assert (digests[0] != digests[1]).all()
    virtual = arrays["input_ids"][0] >= spec.llm.vocab_size
    assert virtual.sum() == 7 * 256
    extra = arrays["prompt_table_extra_ids"][0][virtual]
    np.testing.assert_array_equal(extra, np.repeat(digests[[0, 1, 2], 0], [768, 256, 768]))


def test_the_same_picture_tiled_otherwise_is_another_one(preprocess: Preprocessor) -> None:
    one = preprocess(Request(text_input="Hi", images=[png(900, 450)]))
    other = preprocess(
        Request(text_input="Hi", images=[png(900, 450)], sampling_parameters='{"max_tiles": 1}')
    )
    assert other["tiles_per_image"].tolist() == [1]
    assert (one["image_digests"] != other["image_digests"]).all()


def test_a_text_only_request_has_no_tiles(preprocess: Preprocessor) -> None:
    arrays = preprocess(Request(text_input="Hi"))
    assert arrays["tiles"].shape == (0, 448, 448, 3)
    assert arrays["image_digests"].shape == (0, 2)
    assert not arrays["prompt_table_extra_ids"].any()


def test_video_frames_are_one_tile_each(preprocess: Preprocessor, spec) -> None:
    arrays = preprocess(
        Request(text_input="Hi", videos=[clip(10)], sampling_parameters='{"num_frames": 4}')
    )
    assert arrays["tiles_per_image"].tolist() == [1] * 4
    assert (arrays["input_ids"][0] >= spec.llm.vocab_size).sum() == 4 * 256


def test_greedy_and_sampled_settings(preprocess: Preprocessor, tokenizer) -> None:
    greedy = preprocess(Request(text_input="Hi"))
    assert greedy["runtime_top_k"].item() == 1
    assert greedy["end_id"].item() == tokenizer.end_id
    settings = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 2**63 + 1, "max_tokens": 9}
    sampled = preprocess(Request(text_input="Hi", sampling_parameters=json.dumps(settings)))
    assert sampled["runtime_top_k"].item() == 7
    assert sampled["runtime_top_p"].item() == pytest.approx(0.9)
    assert sampled["seed"].item() == 2**63 + 1
    assert sampled["request_output_len"].item() == 9
    seeds = {preprocess(Request(text_input="Hi"))["seed"].item() for _ in range(4)}
    assert len(seeds) == 4  # a request without a seed gets its own


def test_tiles_of_each_picture_and_of_all_together(preprocess: Preprocessor) -> None:
    images = [png(1000, 1000, seed) for seed in range(3)]

    def tiles(images: list[bytes], **sampling: Any) -> list[int]:
        request = Request(text_input="Hi", images=images, sampling_parameters=json.dumps(sampling))
        found: list[int] = preprocess(request)["tiles_per_image"].tolist()
        return found

    # 1000 x 1000: grids 1x1, 2x2, 3x3, and the thumbnail
    assert tiles(images) == [10, 10, 10]
    assert tiles(images, max_tiles=4) == [5, 5, 5]
    assert tiles(images, max_tiles=[1, 9, 4]) == [1, 10, 5]
    # max(1, total // number of images), the training rule
    assert tiles(images, total_max_tiles=12) == [5, 5, 5]  # 4 each
    assert tiles(images, total_max_tiles=11) == [1, 1, 1]  # 3 each: 1x1 is nearest to a square
    assert tiles(images, total_max_tiles=2) == [1, 1, 1]
    assert tiles(images[:1], total_max_tiles=10) == [10]
    assert tiles([], total_max_tiles=10) == []


def test_stop_words_survive_the_trip_through_the_tensors(preprocess, tokenizer) -> None:
    words = ["END", "x y", "。"]
    arrays = preprocess(Request(text_input="Hi", sampling_parameters=json.dumps({"stop": words})))
    request = generation_request(arrays, request_id="x", is_cancelled=lambda: False)
    assert request.stop_words == tuple(tuple(tokenizer.encode(word)) for word in words)
    none = generation_request(
        preprocess(Request(text_input="Hi")), request_id="x", is_cancelled=lambda: False
    )
    assert none.stop_words == ()


def test_no_stop_word_is_sent_that_would_end_another_answer(preprocess, tokenizer) -> None:
    """TensorRT-LLM compares with the prompt's end too, and from the first token."""

    def sent(**sampling: Any) -> tuple[tuple[int, ...], ...]:
        arrays = preprocess(Request(text_input="Hi", sampling_parameters=json.dumps(sampling)))
        return generation_request(
            arrays, request_id="x", is_cancelled=lambda: False
        ).stop_words  # fmt: skip

    prompt_end = "\n"
    assert sent(stop=[prompt_end + "no", "END", "<|im_end|>"]) == (tuple(tokenizer.encode("END")),)
    assert sent(stop=["END"], min_tokens=2, max_tokens=4) == ()


def test_what_postprocessing_has_to_know(preprocess: Preprocessor) -> None:
    sampling = {"stop": "END", "min_tokens": 2, "max_tokens": 7}
    request = Request(text_input="Hi", sampling_parameters=json.dumps(sampling), stream=True)
    rule = stop_rule(request, preprocess(request))
    assert rule == StopRule(("END",), min_tokens=2, max_tokens=7, stream=True)
    assert StopRule.from_json(rule.to_json()) == rule
    plain = Request(text_input="Hi")
    assert stop_rule(plain, preprocess(plain)) is None


def test_word_list_is_tensorrt_llms_format() -> None:
    # flat ids padded with 0 over cumulative end offsets padded with -1
    np.testing.assert_array_equal(word_list([[5, 6], [7]]), [[5, 6, 7], [2, 3, -1]])
    np.testing.assert_array_equal(word_list([]), [[0], [-1]])


def test_lengths(preprocess: Preprocessor) -> None:
    n = preprocess(Request(text_input="Hi"))["input_lengths"].item()
    preprocess.limits = replace(preprocess.limits, max_seq_len=n + 10)
    arrays = preprocess(Request(text_input="Hi"))
    assert arrays["request_output_len"].item() == 10  # the default is cut to what fits
    preprocess(Request(text_input="Hi", sampling_parameters='{"max_tokens": 10}'))
    with pytest.raises(RequestTooLong, match=rf"prompt \({n} tokens\) \+ max_tokens \(11\)"):
        preprocess(Request(text_input="Hi", sampling_parameters='{"max_tokens": 11}'))
    preprocess.limits = replace(preprocess.limits, max_seq_len=n)
    with pytest.raises(RequestTooLong, match=f"the prompt has {n} tokens"):
        preprocess(Request(text_input="Hi"))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request(), InvalidRequest, "got neither"),
        (Request(text_input="<|im_end|>"), ForbiddenToken, "im_end"),
        (Request(text_input="Hi", images=[b"x"]), InvalidImage, "image 1 is not a picture"),
        (Request(text_input="Hi", images=[png(4, 4), b"x"]), InvalidImage, "image 2 is not"),
        (Request(text_input="Hi", images=[b"x"] * 65), InvalidRequest, "65 images; the limit"),
        (Request(text_input="Hi", videos=[b"x"] * 5), InvalidRequest, "5 videos; the limit"),
        (Request(text_input="x" * 2**21), RequestTooLong, "text_input has 2097152 bytes"),
        (
            Request(text_input="Hi", images=[png(800, 600)] * 5),
            RequestTooLong,
            r"more than 64 tiles \(image 5 brings them to 65\)",
        ),
        (
            Request(text_input="Hi", sampling_parameters='{"max_tiles": 41}'),
            InvalidSampling,
            "from 1 to 40",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(preprocess, request_: Request, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        preprocess(request_)


def test_a_guide_is_sent_as_type_and_text(preprocess: Preprocessor) -> None:
    asked = Request(text_input="Hi", sampling_parameters='{"guided_choice": ["ja", "nein."]}')
    arrays = preprocess(asked)
    assert arrays["guided_decoding_guide_type"].tolist() == [[b"regex"]]
    assert arrays["guided_decoding_guide"].tolist() == [[rb"(ja)|(nein\.)"]]
