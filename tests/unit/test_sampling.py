from __future__ import annotations

import json

import pytest

from internvl_triton.errors import InvalidSampling
from internvl_triton.sampling import SamplingParams


def test_nothing_given_is_greedy() -> None:
    for text in (None, "", "  ", "{}", '{"temperature": null}'):
        params = SamplingParams.from_json(text)
        assert params == SamplingParams()
        assert params.is_greedy


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"max_tokens": 1}, "max_tokens", 1),
        ({"temperature": 0.7}, "temperature", 0.7),
        ({"top_p": 1}, "top_p", 1),
        ({"seed": 2**64 - 1}, "seed", 2**64 - 1),
        ({"stop": "END"}, "stop", ("END",)),
        ({"stop": ["a", "b", "c", "d"]}, "stop", ("a", "b", "c", "d")),
        ({"presence_penalty": -2.0}, "presence_penalty", -2.0),
        ({"logprobs": True}, "logprobs", True),
        ({"max_tiles": 6}, "max_tiles", 6),
        ({"max_tiles": [1, 6]}, "max_tiles", (1, 6)),
        ({"total_max_tiles": 24}, "total_max_tiles", 24),
    ],
    ids=str,
)
def test_valid(given: dict, field: str, value: object) -> None:
    assert getattr(SamplingParams.from_json(json.dumps(given)), field) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"temperature": -1}', "temperature is -1; it must be a number from 0"),
        ('{"temperature": "hot"}', 'temperature is "hot"'),
        ('{"temperature": true}', "temperature is true"),
        ('{"temperature": NaN}', "not valid JSON"),
        ('{"temperature": 1e999}', "temperature is Infinity"),
        ('{"temperature": 1' + 400 * "0" + "}", "temperature is 1000"),
        ('{"top_p": 0}', "above 0 up to 1"),
        ('{"top_p": 1.5}', "top_p is 1.5"),
        ('{"top_k": -1}', "top_k is -1"),
        ('{"top_k": 1.5}', "integer"),
        ('{"max_tokens": 0}', "max_tokens is 0"),
        ('{"max_tokens": 2.0}', "max_tokens is 2.0"),
        ('{"max_tokens": 4, "min_tokens": 5}', r"at most max_tokens \(4\)"),
        ('{"seed": -1}', "seed is -1"),
        ('{"repetition_penalty": 0}', "above 0"),
        ('{"frequency_penalty": 3}', "from -2 up to 2"),
        ('{"stop": ["a","b","c","d","e"]}', "at most 4 strings"),
        ('{"stop": [""]}', "1 to 256 characters"),
        ('{"stop": 7}', "stop is 7"),
        ('{"stop": "\\ud83d"}', "unpaired surrogate"),
        ('{"max_tiles": 0}', "max_tiles is 0"),
        ('{"max_tiles": [1, 0]}', r"max_tiles is \[1, 0\]"),
        ('{"max_tiles": true}', "max_tiles is true"),
        ('{"max_tiles": "6"}', "or a list of those, one per image"),
        ('{"max_tiles": [[1]]}', "max_tiles is"),
        ('{"total_max_tiles": 0}', "total_max_tiles is 0"),
        ('{"total_max_tiles": 4, "max_tiles": 1}', "give one of them"),
        ('{"num_frames": 0}', "num_frames is 0"),
        ('{"logprobs": 5}', "true or false"),
        ('{"temprature": 1}', "unknown key 'temprature'; did you mean 'temperature'"),
        ('{"n": 2}', "unknown key 'n'"),
        ('{"max_tokens": ', "not valid JSON"),
        ("[1]", "must be a JSON object.*got a list"),
        ('"x"', "got a string"),
    ],
)
def test_invalid(given: str, message: str) -> None:
    with pytest.raises(InvalidSampling, match=message):
        SamplingParams.from_json(given)


def test_a_list_of_tiles_has_one_for_every_image() -> None:
    params = SamplingParams.from_json('{"max_tiles": [1, 6]}')
    assert params.tiles_per_image(2, default=12, largest=40) == [1, 6]
    with pytest.raises(InvalidSampling, match="one for each of 3 images"):
        params.tiles_per_image(3, default=12, largest=40)
    with pytest.raises(InvalidSampling, match="from 1 to 5"):
        params.tiles_per_image(2, default=12, largest=5)
