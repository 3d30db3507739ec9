"""The request's `sampling_parameters`: one JSON object, checked key by key."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, fields
from typing import Any

from internvl_triton.errors import InvalidSampling
from internvl_triton.top_log_probs import MAX_TOP_LOG_PROBS

__all__ = ["SamplingParams"]

_MAX_STOP = 4
_MAX_STOP_CHARACTERS = 256
_MAX_REGEX_CHARACTERS = 4096
_MAX_CHOICES = 256


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of generation and tiling. OpenAI's names where OpenAI has them."""

    # length
    max_tokens: int | None = None  # None: the deployment's default, cut to what still fits
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    # choice of the next token; temperature 0 is greedy
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None  # None: a new one for every request
    # penalties, over the tokens of prompt and answer (TensorRT-LLM's rule)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # extras
    logprobs: bool = False
    top_logprobs: int = 0  # alternatives of each token; needs logprobs
    # the form of the answer, see guides.py; at most one of them
    guided_json: dict[str, Any] | None = None  # a JSON schema
    guided_regex: str | None = None  # that the whole answer matches
    guided_choice: tuple[str, ...] = ()  # texts, one of which is the answer
    # tiles, without the thumbnail; None: the model's max_tiles for every picture
    max_tiles: int | tuple[int, ...] | None = None  # of every picture, or of each
    total_max_tiles: int | None = None  # of all pictures together, see `tiles_per_image`
    num_frames: int = 8  # per video

    def __post_init__(self) -> None:
        """Raises InvalidSampling naming the key, the value and the allowed range."""
        for key in ("max_tokens", "total_max_tiles"):
            if getattr(self, key) is not None:
                self._integer(key, 1, 2**31 - 1)
        self._check_max_tiles()
        self._integer("min_tokens", 0, 2**31 - 1)
        self._integer("top_k", 0, 2**31 - 1)
        self._integer("num_frames", 1, 1024)
        if self.seed is not None:
            self._integer("seed", 0, 2**64 - 1)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, exclusive_low=True)
        self._number("repetition_penalty", 0.0, 100.0, exclusive_low=True)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        if not isinstance(self.logprobs, bool):
            self._refuse("logprobs", "true or false")
        self._integer("top_logprobs", 0, MAX_TOP_LOG_PROBS)
        if self.top_logprobs and not self.logprobs:
            self._refuse("top_logprobs", "0 without logprobs: true")
        self._check_stop()
        self._check_guides()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            self._refuse("min_tokens", f"at most max_tokens ({self.max_tokens})")

    @classmethod
    def from_json(cls, text: str | None) -> SamplingParams:
        """Parse the `sampling_parameters` tensor; None or "" gives the defaults.

        Raises InvalidSampling for broken JSON, an unknown key or a bad value.
        """
        if text is None or not text.strip():
            return cls()
        try:
            values = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidSampling(f"sampling_parameters is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise InvalidSampling(
                "sampling_parameters must be a JSON object such as "
                f'{{"max_tokens": 64}}; got {_type_name(values)}'
            )
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> SamplingParams:
        """Settings by key, as JSON gives them; null is a key left out.

        Raises InvalidSampling for an unknown key or a bad value.
        """
        allowed = [field.name for field in fields(cls)]
        for key in values:
            if key not in allowed:
                close = difflib.get_close_matches(key, allowed, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InvalidSampling(
                    f"sampling_parameters has an unknown key {key[:64]!r}{hint} "
                    f"Allowed: {', '.join(allowed)}"
                )
        values = {key: value for key, value in values.items() if value is not None}
        if isinstance(values.get("stop"), str):
            values["stop"] = [values["stop"]]
        for key in ("stop", "max_tiles", "guided_choice"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    def tiles_per_image(self, num_images: int, *, default: int, largest: int) -> list[int]:
        """The largest number of tiles of each of a request's pictures, without the thumbnail.

        A total is divided as in training: max(1, total_max_tiles // num_images) for each
        (`internvl/train/dataset.py`, OpenGVLab/InternVL @ 2410d1d). Frames of clips do not count:
        they are one tile each.

        default: without any limit in the request. largest: that one picture can be given.

        Raises InvalidSampling for a list of another length, or a number above `largest`.
        """
        given = self.max_tiles
        if isinstance(given, tuple):
            if len(given) != num_images:
                self._refuse(
                    "max_tiles", f"one integer, or a list with one for each of {num_images} images"
                )
            tiles = list(given)
        elif given is not None:
            tiles = [given] * num_images
        elif self.total_max_tiles is not None:
            return [min(largest, max(1, self.total_max_tiles // max(1, num_images)))] * num_images
        else:
            return [default] * num_images
        if (given if isinstance(given, int) else max(tiles, default=1)) > largest:
            self._refuse("max_tiles", f"an integer from 1 to {largest}")
        return tiles

    def _check_max_tiles(self) -> None:
        if self.max_tiles is None:
            return
        for value in self.max_tiles if isinstance(self.max_tiles, tuple) else (self.max_tiles,):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                self._refuse("max_tiles", "an integer from 1, or a list of those, one per image")
        if self.total_max_tiles is not None:
            raise InvalidSampling(
                "sampling_parameters has max_tiles and total_max_tiles; give one of them"
            )

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or len(self.stop) > _MAX_STOP:
            self._refuse("stop", f"a string or a list of at most {_MAX_STOP} strings")
        for word in self.stop:
            if not isinstance(word, str) or not 1 <= len(word) <= _MAX_STOP_CHARACTERS:
                self._refuse("stop", f"strings of 1 to {_MAX_STOP_CHARACTERS} characters")
            if any("\ud800" <= character <= "\udfff" for character in word):
                self._refuse("stop", "of whole characters, without an unpaired surrogate")

    def _check_guides(self) -> None:
        given = [
            key
            for key in ("guided_json", "guided_regex", "guided_choice")
            if getattr(self, key) not in (None, ())
        ]
        if len(given) > 1:
            self._refuse(given[1], f"left out, because {given[0]} is given: one guide a request")
        if given and self.min_tokens:
            self._refuse("min_tokens", f"0 with {given[0]}, which says where the answer ends")
        if self.guided_json is not None and not isinstance(self.guided_json, dict):
            self._refuse("guided_json", 'a JSON schema such as {"type": "object"}')
        regex = self.guided_regex
        if regex is not None and not (
            isinstance(regex, str) and 1 <= len(regex) <= _MAX_REGEX_CHARACTERS
        ):
            self._refuse("guided_regex", f"a string of 1 to {_MAX_REGEX_CHARACTERS} characters")
        choices = self.guided_choice
        if not isinstance(choices, tuple) or len(choices) > _MAX_CHOICES:
            self._refuse("guided_choice", f"a list of at most {_MAX_CHOICES} strings")
        if not all(isinstance(text, str) and 1 <= len(text) <= 1024 for text in choices):
            self._refuse("guided_choice", "strings of 1 to 1024 characters")

    def _integer(self, key: str, low: int, high: int) -> None:
        value = getattr(self, key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._refuse(key, f"an integer from {low} to {high}")

    def _number(self, key: str, low: float, high: float, *, exclusive_low: bool = False) -> None:
        value = getattr(self, key)
        ok = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (value > low if exclusive_low else value >= low)
            and value <= high
        )
        if not ok:
            bound = "above" if exclusive_low else "from"
            self._refuse(key, f"a number {bound} {low:g} up to {high:g}")

    def _refuse(self, key: str, allowed: str) -> None:
        given = json.dumps(getattr(self, key), default=str)
        raise InvalidSampling(f"sampling_parameters.{key} is {given[:80]}; it must be {allowed}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")
