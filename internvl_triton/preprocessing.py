"""The preprocessing step: one request to tiles, prompt ids and generation settings."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.errors import (
    ForbiddenToken,
    InvalidRequest,
    InvalidSampling,
    RequestTooLong,
)
from internvl_triton.guides import requested_guide
from internvl_triton.limits import Limits
from internvl_triton.media import (
    content_digest,
    decode_image,
    decode_video,
    packed_pixels,
    unwrap_data_url,
)
from internvl_triton.messages import parse_conversation
from internvl_triton.model_spec import ModelSpec
from internvl_triton.prompt import (
    Conversation,
    ImageRef,
    Prompt,
    VideoRef,
    Visual,
    build_prompt,
)
from internvl_triton.resizing import compile_kernel
from internvl_triton.sampling import SamplingParams
from internvl_triton.stage_metrics import StageTimes
from internvl_triton.stop_strings import StopRule
from internvl_triton.tiling import choose_grid, tile_image
from internvl_triton.tokenizer import Tokenizer

__all__ = ["DECODE", "TILING", "Preprocessor", "Request", "stop_rule"]

DECODE, TILING = "decode", "tiling"


@dataclass(frozen=True)
class Request:
    """The ensemble's inputs. Exactly one of text_input and messages is given."""

    text_input: str | None = None
    messages: str | None = None
    images: Sequence[bytes] = ()
    videos: Sequence[bytes] = ()
    sampling_parameters: str | None = None
    stream: bool = False


class _Picture(NamedTuple):
    """pixels: of `packed_pixels`. identity: the bytes that make it this picture. what: its name in
    errors."""

    pixels: NDArray[np.uint32]
    identity: bytes
    what: str
    max_tiles: int


class Preprocessor:
    """Refuses everything that can be refused before the engines see the request.

    threads: how many work on the tiles of one picture.
    """

    def __init__(
        self, spec: ModelSpec, limits: Limits, tokenizer: Tokenizer, *, threads: int = 1
    ) -> None:
        self.spec = spec
        self.limits = limits
        self.tokenizer = tokenizer
        compile_kernel()  # now, not in the first request
        self._pool = ThreadPoolExecutor(threads, "tiling") if threads > 1 else None

    def __call__(
        self, request: Request, times: StageTimes | None = None
    ) -> dict[str, NDArray[Any]]:
        """Tensor name -> array, as `tensor_contract.PREPROCESSING.outputs` lists them.

        times: gets the seconds of the stages DECODE and TILING.

        Raises InvalidRequest (and its kinds) with a message for the caller.
        """
        self._check_counts(request)
        sampling = SamplingParams.from_json(request.sampling_parameters)
        max_tiles = sampling.tiles_per_image(
            len(request.images),
            default=self.spec.max_tiles,
            largest=min(self.limits.max_tiles_per_request - 1, 40),  # room for the thumbnail
        )
        conversation = parse_conversation(
            text_input=request.text_input,
            messages=request.messages,
            num_images=len(request.images),
            num_videos=len(request.videos),
            default_system=self.spec.system_message,
        )
        tiles, visuals = self._tile_media(
            conversation,
            request,
            max_tiles,
            sampling.num_frames,
            StageTimes() if times is None else times,
        )
        prompt = build_prompt(
            conversation,
            visuals,
            tokenizer=self.tokenizer,
            tokens_per_tile=self.spec.tokens_per_tile,
            vocab_size=self.spec.llm.vocab_size,
            template=self.spec.template,
        )
        max_tokens = self._max_tokens(len(prompt.input_ids), sampling)
        flat = [visual for group in visuals for visual in group]
        return {
            contract.TILES.name: tiles,
            contract.IMAGE_DIGESTS.name: np.array(
                [visual.digest for visual in flat], np.uint64
            ).reshape(-1, 2),
            contract.TILES_PER_IMAGE.name: np.array(
                [visual.num_tiles for visual in flat], np.int32
            ),
            **self._llm_inputs(prompt, sampling, max_tokens, request.stream),
        }

    def _check_counts(self, request: Request) -> None:
        limits = self.limits
        for what, given, limit in (
            ("images", len(request.images), limits.max_images),
            ("videos", len(request.videos), limits.max_videos),
        ):
            if given > limit:
                raise InvalidRequest(f"the request has {given} {what}; the limit is {limit}")
        for name in ("text_input", "messages", "sampling_parameters"):
            size = len((getattr(request, name) or "").encode())
            if size > limits.max_text_bytes:
                raise RequestTooLong(
                    f"{name} has {size} bytes; the limit is {limits.max_text_bytes} bytes"
                )

    def _tile_media(
        self,
        conversation: Conversation,
        request: Request,
        max_tiles: Sequence[int],
        num_frames: int,
        times: StageTimes,
    ) -> tuple[NDArray[np.uint8], list[list[Visual]]]:
        """uint8 (num_tiles, S, S, 3) of all pictures in prompt order, and what they are."""
        budget = self.limits.max_tiles_per_request
        size = self.spec.tile_size
        parts: list[NDArray[np.uint8]] = []
        visuals: list[list[Visual]] = []
        used = 0
        for ref in conversation.media:
            with times.stage(DECODE):
                pictures = (
                    self._pictures(ref, request.images, max_tiles)
                    if isinstance(ref, ImageRef)
                    else self._frames(ref, request.videos, num_frames)
                )
            group = []
            for pixels, identity, what, limit in pictures:
                height, width = pixels.shape
                grid = choose_grid(width, height, max_tiles=limit, tile_size=size)
                count = grid.num_tiles_with_thumbnail(use_thumbnail=self.spec.use_thumbnail)
                used += count
                if used > budget:
                    raise RequestTooLong(
                        f"the pictures need more than {budget} tiles ({what} brings them to "
                        f"{used}); send fewer, or lower max_tiles (now {limit})"
                    )
                with times.stage(TILING):
                    parts.append(
                        tile_image(
                            pixels,
                            max_tiles=limit,
                            tile_size=size,
                            use_thumbnail=self.spec.use_thumbnail,
                            pool=self._pool,
                        )
                    )
                digest = content_digest(identity, grid.columns, grid.rows, size, count)
                group.append(Visual(count, digest))
            visuals.append(group)
        if not parts:
            return np.empty((0, size, size, 3), np.uint8), visuals
        return parts[0] if len(parts) == 1 else np.concatenate(parts), visuals

    def _pictures(
        self, ref: ImageRef, images: Sequence[bytes], max_tiles: Sequence[int]
    ) -> list[_Picture]:
        pictures = []
        for index in range(ref.index, ref.index + ref.count):
            what = f"image {index + 1}"
            data = unwrap_data_url(images[index], what)
            pixels = decode_image(data, what, self.limits)
            pictures.append(_Picture(pixels, data, what, max_tiles[index]))
        return pictures

    def _frames(self, ref: VideoRef, videos: Sequence[bytes], num_frames: int) -> list[_Picture]:
        what = f"video {ref.index + 1}"
        data = unwrap_data_url(videos[ref.index], what)
        frames = decode_video(data, what, num_frames=num_frames, limits=self.limits)
        pictures = []
        while frames:  # each goes as it is packed: a clip of large ones takes gigabytes
            frame = frames.pop(0)
            # the reference shows each frame as one tile
            pictures.append(_Picture(packed_pixels(frame), frame.tobytes(), what, 1))
        return pictures

    def _max_tokens(self, num_input_tokens: int, sampling: SamplingParams) -> int:
        room = self.limits.max_seq_len - num_input_tokens
        wanted = sampling.max_tokens
        if room < 1:
            raise RequestTooLong(
                f"the prompt has {num_input_tokens} tokens; the limit for prompt and answer "
                f"together is {self.limits.max_seq_len}"
            )
        if sampling.top_logprobs:
            most = max(1, self.limits.max_logits_bytes // (4 * self.spec.llm.vocab_size))
            if wanted is not None and wanted > most:
                raise InvalidSampling(
                    f"sampling_parameters.max_tokens is {wanted}; with top_logprobs it can be at "
                    f"most {most}"
                )
            room = min(room, most)
        if wanted is None:
            return min(self.limits.default_max_tokens, room)
        if wanted > room:
            raise RequestTooLong(
                f"prompt ({num_input_tokens} tokens) + max_tokens ({wanted}) = "
                f"{num_input_tokens + wanted} exceed the limit of {self.limits.max_seq_len}; "
                f"max_tokens can be at most {room} for this prompt"
            )
        return wanted

    def _llm_inputs(
        self, prompt: Prompt, sampling: SamplingParams, max_tokens: int, stream: bool
    ) -> dict[str, NDArray[Any]]:
        """Inputs of `tensorrt_llm`, each with a leading batch dimension of one."""
        greedy = sampling.is_greedy
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        ids = prompt.input_ids
        scalars = (
            (contract.INPUT_LENGTHS, len(ids), np.int32),
            (contract.REQUEST_OUTPUT_LEN, max_tokens, np.int32),
            (contract.END_ID, self.tokenizer.end_id, np.int32),
            (contract.PAD_ID, self.tokenizer.pad_id, np.int32),
            (contract.TEMPERATURE, 1.0 if greedy else sampling.temperature, np.float32),
            (contract.RUNTIME_TOP_K, 1 if greedy else sampling.top_k, np.int32),
            (contract.RUNTIME_TOP_P, sampling.top_p, np.float32),
            (contract.REPETITION_PENALTY, sampling.repetition_penalty, np.float32),
            (contract.PRESENCE_PENALTY, sampling.presence_penalty, np.float32),
            (contract.FREQUENCY_PENALTY, sampling.frequency_penalty, np.float32),
            (contract.MIN_TOKENS, sampling.min_tokens, np.int32),
            (contract.SEED, seed, np.uint64),
            (contract.RETURN_LOG_PROBS, sampling.logprobs, np.bool_),
            (contract.RETURN_GENERATION_LOGITS, sampling.top_logprobs > 0, np.bool_),
            (contract.RETURN_NUM_INPUT_TOKENS, True, np.bool_),
            (contract.RETURN_NUM_OUTPUT_TOKENS, False, np.bool_),  # postprocessing counts them
            (contract.EXCLUDE_INPUT_IN_OUTPUT, True, np.bool_),
            (contract.STREAMING, stream, np.bool_),
        )
        arrays: dict[str, NDArray[Any]] = {
            tensor.name: np.array([[value]], dtype) for tensor, value, dtype in scalars
        }
        guide = requested_guide(sampling)
        if guide is not None:
            for tensor, text in (
                (contract.GUIDED_DECODING_GUIDE_TYPE, guide.guide_type),
                (contract.GUIDED_DECODING_GUIDE, guide.guide),
            ):
                arrays[tensor.name] = np.array([[text.encode()]], np.object_)
        stop_words = self._stop_words(sampling, ids.tolist())
        arrays[contract.INPUT_IDS.name] = ids[None]
        arrays[contract.PROMPT_TABLE_EXTRA_IDS.name] = prompt.prompt_table_extra_ids[None]
        arrays[contract.STOP_WORDS_LIST.name] = word_list(stop_words)[None]
        return arrays

    def _stop_words(self, sampling: SamplingParams, prompt_ids: list[int]) -> list[list[int]]:
        """Token ids of the stop strings at which TensorRT-LLM can end the answer by itself.

        Postprocessing finds every stop string; these only spare it the steps until its stop
        arrives. Left out is what TensorRT-LLM would find elsewhere than in the answer's text
        after min_tokens: it compares with prompt and answer together, and from the first token.
        """
        words = []
        for text in sampling.stop if sampling.min_tokens == 0 else ():
            try:
                word = self.tokenizer.encode(text)
            except ForbiddenToken:  # spells a special token, which no answer's text holds
                continue
            begun = any(word[:n] == prompt_ids[-n:] for n in range(1, len(word)))
            if not begun and self.tokenizer.token_bytes.join(word) == text.encode():
                words.append(word)
        return words


def stop_rule(request: Request, tensors: dict[str, NDArray[Any]]) -> StopRule | None:
    """What postprocessing has to know of a request before its first chunk; None without `stop`.

    tensors: what Preprocessor made of the request.
    """
    stop = SamplingParams.from_json(request.sampling_parameters).stop
    if not stop:
        return None
    return StopRule(
        stop=stop,
        min_tokens=int(tensors[contract.MIN_TOKENS.name].item()),
        max_tokens=int(tensors[contract.REQUEST_OUTPUT_LEN.name].item()),
        stream=request.stream,
    )


def word_list(words: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """TensorRT-LLM's word list: int32 (2, L), flat ids over cumulative end offsets.

    Ids are padded with 0, offsets with -1; no words are one column of padding, as NVIDIA's own
    preprocessing sends them (`to_word_list_format`).
    """
    flat = [token for word in words for token in word]
    length = max(1, len(flat))
    array = np.array([[0] * length, [-1] * length], np.int32)
    array[0, : len(flat)] = flat
    array[1, : len(words)] = np.cumsum([len(word) for word in words])
    return array
