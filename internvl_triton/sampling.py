"""The request's `sampling_parameters`: one JSON object, checked key by key."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, fields
from typing import Any

from internvl_triton.errors import InvalidSampling

__all__ = ["SamplingParams"]

_MAX_STOP = 4
_MAX_STOP_CHARACTERS = 256


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
    max_tiles: int | None = None  # per picture, without the thumbnail; None: the model's
    num_frames: int = 8  # per video

    def __post_init__(self) -> None:
        """Raises InvalidSampling naming the key, the value and the allowed range."""
        for key in ("max_tokens", "max_tiles"):
            if getattr(self, key) is not None:
                self._integer(key, 1, 2**31 - 1)
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
        self._check_stop()
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
        stop = values.get("stop")
        if isinstance(stop, str):
            values["stop"] = (stop,)
        elif isinstance(stop, list):
            values["stop"] = tuple(stop)
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    def _check_stop(self) -> None:
        if not isinstance(self.stop, tuple) or len(self.stop) > _MAX_STOP:
            self._refuse("stop", f"a string or a list of at most {_MAX_STOP} strings")
        for word in self.stop:
            if not isinstance(word, str) or not 1 <= len(word) <= _MAX_STOP_CHARACTERS:
                self._refuse("stop", f"strings of 1 to {_MAX_STOP_CHARACTERS} characters")

    def _integer(self, key: str, low: int, high: int) -> None:
        value = getattr(self, key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._refuse(key, f"an integer from {low} to {high}")

    def _number(self, key: str, low: float, high: float, *, exclusive_low: bool = False) -> None:
        value = getattr(self, key)
        ok = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
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
