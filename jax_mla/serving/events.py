"""What a step did for a request, and where the engine stands."""

from __future__ import annotations

import dataclasses

from jax_mla.serving.request import FinishReason, Request, TokenLogprobs


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step did for a request.

    Attributes:
      token: written by it, or None where the request ended without one.
      finish_reason: None while it goes on.
    """

    request: Request
    token: int | None
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """Where the engine stands, and sums since its start.

    Attributes:
      cached_pages: those that nobody uses, and whose tokens can still be found.
      hit_tokens: of prompts, found in the prefix cache; computed_tokens: all others, and those
        computed once more after a preemption.
      recompiles: programs compiled after `warm_up`.
    """

    running: int
    waiting: int
    num_pages: int
    pages_in_use: int
    cached_pages: int
    computed_tokens: int
    hit_tokens: int
    generated_tokens: int
    preemptions: int
    page_copies: int
    steps: int
    recompiles: int
    finished: dict[str, int]
