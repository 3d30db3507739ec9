"""In-flight batching: one thread that steps all running requests together."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_triton import tensor_contract as contract
from internvl_triton.cpu_llm.generation import EngineLimits, GenerationRequest, validate_request
from internvl_triton.cpu_llm.kv_cache import KvCache
from internvl_triton.cpu_llm.prefix_cache import PrefixCache
from internvl_triton.cpu_llm.sequence import OnChunk, Sequence
from internvl_triton.cpu_llm.transformer import Segment
from internvl_triton.errors import EngineError, InternVLTritonError, InvalidSampling
from internvl_triton.guides import GuideCompiler, GuideMatcher

__all__ = ["EngineStats", "LanguageModel", "Scheduler"]

logger = logging.getLogger(__name__)

PROMPT_TOKENS_PER_STEP = 512  # so that a long prompt delays the answers of others only a little
REPORT_SECONDS = 0.25  # how often the numbers of tokens are reported while requests run
EARLY_STOP_SECONDS = 5.0  # a stop waits this long for a request that has not arrived yet
MAX_EARLY_STOPS = 1024

CLOSED = "the language model engine was shut down before this request was finished"
LATE = (
    contract.TIMED_OUT + "no complete answer within {:g} s of reaching the language model; "
    "allow more time, or lower max_tokens"
)
FAILED = "the language model engine failed on this request; the server's log says why"


class LanguageModel(Protocol):
    """What the scheduler needs of `Transformer`."""

    vocab_size: int
    hidden_size: int

    def new_caches(self) -> list[KvCache]: ...

    def forward(self, segments: SequenceOf[Segment]) -> NDArray[np.float32]:
        """One row per token of all segments."""
        ...

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows of `forward` -> (rows, vocab_size)."""
        ...


@dataclass(frozen=True)
class EngineStats:
    """Requests now, and totals since the start. Every request ends in one of the last three."""

    running: int
    waiting: int
    prompt_tokens: int  # fed to the model
    reused_tokens: int  # of prompts, found in the prefix cache instead
    generated_tokens: int
    finished: int  # requests that got their answer
    stopped: int  # requests whose caller ended them or went away
    failed: int  # requests that got an error


class Scheduler:
    """Requests join and leave between steps. Every submitted request gets exactly one final chunk.

    `on_chunk` is called on the scheduler's thread (for a refused request: on the caller's) and
    must not block; if it raises, its request ends and the others go on.

    guides: for requests whose answers must have a form.
    prefix_cache: keys and values to begin prompts with; None computes every prompt from its start.
    on_change: called on the scheduler's thread when `stats` have changed, between steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch_size: int,
        max_seq_len: int,
        max_visual_tokens: int,
        max_queue_size: int,
        guides: GuideCompiler | None = None,
        prefix_cache: PrefixCache | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_queue_size = max_queue_size
        self.limits = EngineLimits(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            max_seq_len=max_seq_len,
            max_visual_tokens=max_visual_tokens,
        )
        self._changed = threading.Condition()  # guards everything below
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._early_stops: OrderedDict[str, float] = OrderedDict()  # request id -> expiry
        self._closed = False
        self._counts = dict.fromkeys(
            (
                "prompt_tokens",
                "reused_tokens",
                "generated_tokens",
                "finished",
                "stopped",
                "failed",
            ),
            0,
        )
        self._guides = guides
        self._prefix_cache = prefix_cache  # the scheduler's thread only, like the rest
        self._on_change = on_change
        self._reported = self.stats()
        self._next_report_s = 0.0
        self._thread = threading.Thread(target=self._run, name="cpu-llm-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        """Queue a request. One that is refused gets its final error chunk before this returns."""
        sequence = Sequence(request, on_chunk)
        error = ""
        try:
            validate_request(request, self.limits)
            sequence.matcher = self._matcher(request)
        except InternVLTritonError as invalid:
            error = str(invalid)
        with self._changed:
            error = error or self._refusal(request.request_id)
            stopped = not error and self._was_stopped_early(request.request_id)
            if not error and not stopped:
                self._waiting.append(sequence)
                self._changed.notify()
                return
        self._finish(sequence, error, stopped=stopped)

    def stop(self, request_id: str) -> None:
        """End a request with what it has so far, before the next step.

        An id that is not known is remembered for a few seconds, in case the stop overtook it.
        """
        with self._changed:
            for sequence in (*self._running, *self._waiting):
                if request_id and sequence.request.request_id == request_id:
                    sequence.stop_requested = True
                    self._changed.notify()
                    return
            if request_id:
                self._early_stops[request_id] = time.monotonic() + EARLY_STOP_SECONDS
                if len(self._early_stops) > MAX_EARLY_STOPS:
                    self._early_stops.popitem(last=False)

    def close(self) -> None:
        """End all requests with an error chunk and the thread. May be called more than once."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(len(self._running), len(self._waiting), **self._counts)

    def _matcher(self, request: GenerationRequest) -> GuideMatcher | None:
        """Raises InvalidSampling for a guide that cannot be enforced."""
        if request.guide is None:
            return None
        if self._guides is None:
            raise InvalidSampling("this engine was started without a vocabulary for guides")
        if request.end_id != self._guides.end_id:
            raise InvalidSampling(
                f"end_id is {request.end_id}; with a guide it must be {self._guides.end_id}"
            )
        return self._guides(request.guide)

    def _refusal(self, request_id: str) -> str:
        """Why a valid request cannot be queued now, or ""."""
        if self._closed:
            return CLOSED
        live = (*self._running, *self._waiting)
        if request_id and any(sequence.request.request_id == request_id for sequence in live):
            return f"request id {request_id!r} is in use by a request that has not finished"
        # places in the batch that the scheduler has not filled yet count as well
        if len(live) >= self.max_batch_size + self.max_queue_size:
            return (
                f"{contract.OVERLOADED}{len(self._running)} requests are running "
                f"(max_batch_size {self.max_batch_size}) and {len(self._waiting)} are waiting "
                f"(max_queue_size {self.max_queue_size}); try again later"
            )
        return ""

    def _was_stopped_early(self, request_id: str) -> bool:
        now = time.monotonic()
        while self._early_stops and next(iter(self._early_stops.values())) < now:
            self._early_stops.popitem(last=False)
        return self._early_stops.pop(request_id, None) is not None

    # --- the scheduler's thread ------------------------------------------------------------------

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._iterate()
            except Exception:  # a bug; whoever is running must not hang on it
                logger.exception("the scheduler failed")
                for sequence in list(self._running):
                    self._finish(sequence, FAILED)

    def _iterate(self) -> bool:
        """One step of all running requests; waits for a request first. False after `close`.

        A method of its own, so that an idle engine holds no finished request's cache.
        """
        self._report()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._running or self._waiting)
            live = [*self._running, *self._waiting]
            closed = self._closed
        if closed:
            for sequence in live:
                self._finish(sequence, CLOSED)
            return False
        for sequence in live:
            self._finish_if_stopped(sequence)
        with self._changed:
            while self._waiting and len(self._running) < self.max_batch_size:
                self._running.append(self._waiting.popleft())
            batch = list(self._running)
        if batch:
            self._report()
            self._step(batch)
        return True

    def _report(self) -> None:
        """Tell about changes: of requests at once, of tokens every REPORT_SECONDS."""
        if self._on_change is None:
            return
        now, stats = time.monotonic(), self.stats()
        tokens = {"prompt_tokens": 0, "reused_tokens": 0, "generated_tokens": 0}
        same_requests = replace(stats, **tokens) == replace(self._reported, **tokens)
        if stats == self._reported or (same_requests and now < self._next_report_s):
            return
        self._reported, self._next_report_s = stats, now + REPORT_SECONDS
        try:
            self._on_change()
        except Exception:
            logger.exception("on_change failed")

    def _finish_if_stopped(self, sequence: Sequence) -> None:
        try:
            stopped = sequence.stop_requested or sequence.request.is_cancelled()
        except Exception:
            logger.exception("is_cancelled of request %r failed", sequence.request.request_id)
            self._finish(sequence, FAILED)
        else:
            if stopped:
                self._finish(sequence, stopped=True)
            elif sequence.is_late:
                self._finish(sequence, LATE.format(sequence.request.timeout_s))

    def _step(self, batch: SequenceOf[Sequence]) -> None:
        """Feed every running sequence its next token, and prompts within the step's budget."""
        fed: list[Sequence] = []
        try:
            segments: list[Segment] = []
            budget = PROMPT_TOKENS_PER_STEP
            for sequence in batch:
                if not sequence.started:
                    if not budget:
                        continue
                    self._start(sequence)
                segment = sequence.feed(budget)
                if segment is None:
                    continue
                if not sequence.answer:
                    budget -= len(segment.token_ids)
                    self._count("prompt_tokens", len(segment.token_ids))
                fed.append(sequence)
                segments.append(segment)
            hidden = self.model.forward(segments)
            last_rows = np.cumsum([len(segment.token_ids) for segment in segments]) - 1
            wanting = [index for index, sequence in enumerate(fed) if sequence.wants_logits]
            logits = self.model.logits(hidden[last_rows[wanting]]) if wanting else hidden[:0]
        except Exception:
            logger.exception("a step of %d requests failed", len(batch))
            for sequence in fed or batch:
                self._finish(sequence, FAILED)
            return
        for index, row in zip(wanting, logits, strict=True):
            self._advance(fed[index], row)

    def _start(self, sequence: Sequence) -> None:
        caches = self.model.new_caches()
        num_reused = 0
        if self._prefix_cache is not None:
            request = sequence.request
            num_reused = self._prefix_cache.take(
                request.input_ids, request.prompt_table_extra_ids, caches
            )
            self._count("reused_tokens", num_reused)
        sequence.start(caches, num_reused=num_reused, vocab_size=self.model.vocab_size)

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        before = len(sequence.answer)
        try:
            complete = sequence.accept(logits)
        except Exception as error:
            logger.exception("sampling for request %r failed", sequence.request.request_id)
            self._finish(sequence, str(error) if isinstance(error, EngineError) else FAILED)
            return
        self._count("generated_tokens", len(sequence.answer) - before)
        if complete:
            self._finish(sequence)
            return
        if sequence.request.streaming and not self._deliver(sequence, final=False):
            self._finish(sequence, FAILED)
        elif before == 0:
            self._store_prefix(sequence)  # for requests that begin alike while this one runs

    def _store_prefix(self, sequence: Sequence) -> None:
        if self._prefix_cache is None:
            return
        try:
            sequence.store_in(self._prefix_cache)
        except Exception:  # it only serves later requests
            logger.exception("the prefix of %r was not kept", sequence.request.request_id)

    def _finish(self, sequence: Sequence, error: str = "", *, stopped: bool = False) -> None:
        """Free the sequence's place, then send its final chunk."""
        with self._changed:
            if sequence in self._running:
                self._running.remove(sequence)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
        self._count("failed" if error else "stopped" if stopped else "finished", 1)
        self._deliver(sequence, final=True, error=error)
        if sequence.started and not error:
            self._store_prefix(sequence)

    def _deliver(self, sequence: Sequence, *, final: bool, error: str = "") -> bool:
        try:
            sequence.on_chunk(sequence.next_chunk(final=final, error=error))
        except Exception:
            logger.exception("on_chunk of request %r failed", sequence.request.request_id)
            return False
        return True

    def _count(self, name: str, number: int) -> None:
        with self._changed:
            self._counts[name] += number
