"""The engine: requests in, tokens out; one step on the device while the last one is read."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jax_mla.checks.sizes import check_one_of, check_positive
from jax_mla.checks.tokens import check_rope
from jax_mla.config.model import DeepSeekConfig
from jax_mla.generation.sampling import SamplingOptions
from jax_mla.params import Params, check_params
from jax_mla.serving.events import Event, Stats
from jax_mla.serving.invariants import check_state, check_step
from jax_mla.serving.pool_size import pages_that_fit
from jax_mla.serving.programs import Chosen
from jax_mla.serving.progress import warming_up
from jax_mla.serving.request import (
    Request,
    RequestOptions,
    TokenLogprobs,
)
from jax_mla.serving.runner import OnRecompile, Part, Runner, Sizes
from jax_mla.serving.scheduler import Scheduler, Step
from jax_mla.sharding.placement import placement_of
from jax_mla.sharding.rules import ShardingRules


class Engine:
    """Runs many requests over one pool of pages, each with the tokens that it would get alone.

    Args:
      num_pages: of the pool; None takes what fits into the free memory of an accelerator, and on a
        CPU what max_batch sequences of max_tokens need, up to a quarter of the free memory.
      page_size: tokens of a page.
      max_batch: requests that run at a time; others wait.
      chunk_tokens: of a prompt in one step; None takes 512, on a CPU 128.
      max_tokens: of a prompt and its continuation; None takes config.max_position_embeddings.
      deterministic: tokens and log probabilities are equal in every bit, whatever else runs and
        whatever was cached or preempted. Requests are then computed one after the other within a
        step, on the device, so that a batch costs the sum of its requests.
      paranoid: pages are filled with NaN before they are written, logits that are not finite are an
        error at once, and every step checks the scheduler's invariants.
      on_recompile: "error" raises where a program is missing after `warm_up`; "count" compiles it.
      rules: those by which `params` were put on a mesh; None takes the defaults. The mesh must not
        shard sequences or positions, and the pool is on every device.

    Not for several threads at once.

    Raises:
      ValueError: a size is out of range, the parameters are not those of the config, or the mesh
        shards sequences or positions.
    """

    def __init__(
        self,
        params: Params,
        config: DeepSeekConfig,
        *,
        num_pages: int | None = None,
        page_size: int = 64,
        max_batch: int = 8,
        chunk_tokens: int | None = None,
        max_tokens: int | None = None,
        deterministic: bool = False,
        paranoid: bool = False,
        on_recompile: OnRecompile = "count",
        rules: ShardingRules | None = None,
    ):
        check_params(params, config, rules)
        check_one_of("on_recompile", on_recompile, ("count", "error"))
        place = placement_of(params, rules)
        for axis in ("batch", "sequence", "context"):
            if place is not None and (axes := place.axes(axis)):
                raise ValueError(
                    f"the engine's mesh must not shard {axis!r}, the rules shard it over {axes}"
                )
        is_cpu = jax.default_backend() == "cpu"
        chunk_tokens = (128 if is_cpu else 512) if chunk_tokens is None else chunk_tokens
        max_tokens = config.max_position_embeddings if max_tokens is None else max_tokens
        check_positive(page_size=page_size, max_batch=max_batch, max_tokens=max_tokens)
        check_rope(max_tokens, config)
        if max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"max_tokens must be at most {config.max_position_embeddings}, the positions that "
                f"the model has, got {max_tokens}"
            )
        if num_pages is None:
            num_pages = pages_that_fit(params, config, page_size, max_batch, max_tokens)
        self.config, self._paranoid = config, paranoid
        self.scheduler = Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            max_tokens=max_tokens - 1,  # rows: the last token is never fed back
            deterministic=deterministic,
        )
        sizes = Sizes(num_pages, page_size, max_batch, chunk_tokens, max_tokens, deterministic)
        self._runner = Runner(
            params, config, sizes, paranoid=paranoid, on_recompile=on_recompile, rules=rules
        )
        self._in_flight: deque[tuple[Step, list[Part]]] = deque()

    @property
    def capacity(self) -> str:
        """The size of the pool, in words."""
        s = self._runner.sizes
        tokens = s.num_pages * s.page_size
        return (
            f"{s.num_pages:,} pages of {s.page_size} tokens = {tokens:,} tokens: "
            f"{s.num_pages // -(-s.max_tokens // s.page_size):,} sequences of {s.max_tokens:,}"
        )

    @property
    def stats(self) -> Stats:
        s = self.scheduler
        cached = sum(s.pool.is_free(page) for page in s.prefix.pages())
        return Stats(
            running=len(s.running),
            waiting=len(s.waiting),
            num_pages=len(s.pool.references),
            pages_in_use=s.pool.num_used,
            cached_pages=cached,
            recompiles=self._runner.num_recompiles,
            **vars(s.counters),
        )

    def warm_up(
        self, *, show: bool = False, cache_dir: str | os.PathLike[str] | None = None
    ) -> int:
        """Compiles all programs that a step may need; how many there are.

        Args:
          show: draws a progress bar, and says how many programs took how long.
          cache_dir: where JAX keeps compiled programs for the next process, of all sizes; for all
            of this process. None leaves JAX's settings as they are.
        """
        if cache_dir is not None:
            jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        with warming_up(show, self.capacity) as on_program:
            self._runner.warm_up(on_program)
        return len(self._runner.programs())

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        max_new_tokens: int,
        options: RequestOptions | None = None,
        fork_of: Request | None = None,
    ) -> Request:
        """Queues a request; `step` computes it.

        Args:
          prompt: token ids.
          sampling: None takes the most likely tokens.
          max_new_tokens: at most so many are written.
          fork_of: an earlier request with the same prompt, whose pages are shared.

        Raises:
          ValueError: the prompt is empty, an id is outside the vocabulary, an option is out of
            range, or the request could never fit; the message has the numbers.
        """
        options = RequestOptions() if options is None else options
        stop_ids = options.stop_token_ids
        stop_ids = self.config.eos_token_id if stop_ids is None else tuple(stop_ids)
        for name, ids in (
            ("prompt", prompt),
            ("stop", stop_ids),
            ("logit_bias", options.logit_bias),
        ):
            self._check_ids(name, ids)
        if fork_of is not None and fork_of.prompt != tuple(prompt):
            raise ValueError("a fork must have the prompt of the request that it is a fork of")
        if fork_of is not None and fork_of.options.cache_salt != options.cache_salt:
            raise ValueError("a fork must have the cache_salt of the request that it is a fork of")
        timeout = options.timeout_s
        request = Request(
            [int(i) for i in prompt],
            max_new_tokens=max_new_tokens,
            sampling=SamplingOptions() if sampling is None else sampling,
            options=options,
            fork_of=fork_of,
            deadline=None if timeout is None else time.monotonic() + timeout,
            stop_ids=stop_ids,
        )
        self.scheduler.submit(request)
        return request

    def submit_many(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        n: int,
        max_new_tokens: int,
        options: RequestOptions | None = None,
    ) -> list[Request]:
        """Queues n continuations of one prompt that share its pages; arguments as in `submit`.

        Continuation i has the seed options.seed + i, modulo 2**32.
        """
        check_positive(n=n)
        options = RequestOptions() if options is None else options
        requests: list[Request] = []
        for i in range(n):
            own = dataclasses.replace(options, seed=(options.seed + i) % 2**32)
            parent = requests[0] if requests else None
            requests.append(
                self.submit(
                    prompt, sampling, max_new_tokens=max_new_tokens, options=own, fork_of=parent
                )
            )
        return requests

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; its pages are free once no step names them."""
        self.scheduler.abort(request)

    @property
    def is_idle(self) -> bool:
        """Nothing is left to do."""
        s = self.scheduler
        return not (s.waiting or s.running or self._in_flight)

    def step(self) -> list[Event]:
        """Dispatches the next step, then reads the tokens of the one before.

        Raises:
          FloatingPointError: logits are not finite, and the engine is paranoid.
        """
        overdue = self.scheduler.end_overdue(time.monotonic())
        events = [Event(request, None, "timeout") for request in overdue]
        step = self.scheduler.plan()
        if step is not None:
            if self._paranoid:
                check_step(self.scheduler, step)
            self._in_flight.append((step, self._runner.run(step)))
        if self._in_flight and (step is None or len(self._in_flight) > 1):
            events += self._read_back(*self._in_flight.popleft())
        if self._paranoid:
            check_state(self.scheduler)
        return events

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do. Requests may be submitted in between."""
        while not self.is_idle:
            yield from self.step()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingOptions | None = None,
        *,
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
        options: RequestOptions | None = None,
    ) -> list[Request]:
        """Continues prompts, and whatever else was submitted; the requests, in order.

        Args:
          prompts: lists of token ids.
          seeds: one per prompt; None counts from options.seed.
          sampling, max_new_tokens, options: of all of them, as in `submit`.

        Raises:
          ValueError: as `submit`, before any prompt is computed.
        """
        options = RequestOptions() if options is None else options
        if seeds is None:
            seeds = [(options.seed + i) % 2**32 for i in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds must be {len(prompts)}, one per prompt, got {len(seeds)}")
        requests: list[Request] = []
        try:
            for prompt, seed in zip(prompts, seeds, strict=True):
                own = dataclasses.replace(options, seed=seed)
                requests.append(
                    self.submit(prompt, sampling, max_new_tokens=max_new_tokens, options=own)
                )
        except ValueError:
            for request in requests:
                self.abort(request)
            raise
        while not self.is_idle:
            self.step()
        return requests

    def _read_back(self, step: Step, parts: list[Part]) -> list[Event]:
        places = [place for part in parts for place in part.read()]
        tokens = [int(chosen.token[i]) for chosen, i in places]
        events = []
        if self._paranoid and -1 in tokens:
            request = step.choosing[tokens.index(-1)]
            raise FloatingPointError(
                f"the logits of token {len(request.tokens)} of request {request.arrival} are not "
                "finite: the parameters hold NaN or infinity, or overflow in their dtype, or a row "
                "was read that nobody wrote"
            )
        receivers = self.scheduler.read_back(tokens)
        for request, token, (chosen, i) in zip(receivers, tokens, places, strict=True):
            if request is None:
                continue
            logprobs = _logprobs(chosen, i, request.options.logprobs)
            if logprobs is not None and token >= 0:
                request.logprobs.append(logprobs)
            written = None if token < 0 else token
            events.append(Event(request, written, request.finish_reason, logprobs))
        return events

    def _check_ids(self, name: str, ids) -> None:
        for token in ids:
            is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not is_integer or not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"{name}: token ids must be from 0 to {self.config.vocab_size - 1}, the "
                    f"vocabulary, got {token!r}"
                )


def _logprobs(chosen: Chosen, row: int, count: int | None) -> TokenLogprobs | None:
    if count is None or chosen.logprob is None:
        return None
    top_token, top_logprob = np.asarray(chosen.top_token), np.asarray(chosen.top_logprob)
    top = zip(top_token[row, :count].tolist(), top_logprob[row, :count].tolist(), strict=True)
    return TokenLogprobs(float(chosen.logprob[row]), tuple(top))
