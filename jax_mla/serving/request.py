"""A request: what was asked, what is written, and what it holds while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from jax_mla.checks.sizes import check_positive

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
# Biased tokens that one request may have, those included that min_tokens holds back.
MAX_BIASED_TOKENS = 320
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """How a request is continued, beside how its tokens are drawn.

    Attributes:
      seed: from 0 to 2**32 - 1. Token i is drawn with fold_in(jax.random.key(seed), i), whatever
        else runs: as `generate` does for a row with key=[seed].
      stop_token_ids: ids that end the request, written as its last token; None takes the config's,
        () never stops.
      min_tokens: before so many are written, no stop id is chosen.
      logprobs: None for none; k for the log probability of each token and the k most likely ones,
        from the logits as the model gives them.
      repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt
        or continuation (CTRL, arXiv 1909.05858). 1 is off.
      presence_penalty, frequency_penalty: subtracted from the logits of tokens in the continuation,
        once, and once per occurrence. 0 is off.
      logit_bias: added to logits, by token id; -inf forbids a token.
      priority: higher runs first, and may take the pages of lower.
      timeout_s: seconds from submission after which the request ends as it is; None waits forever.
      cache_salt: requests share pages only with requests of equal salt.

    Raises:
      ValueError: an option is out of its range; the message names it and its value.
    """

    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 0, 2**32 - 1)
        _check_range("min_tokens", self.min_tokens, 0, None)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty!r}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= (value := getattr(self, name)) <= 2:
                raise ValueError(f"{name} must be from -2 to 2, got {value!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0 or None, got {self.timeout_s!r}")
        for token, bias in self.logit_bias.items():
            if not bias < float("inf"):
                raise ValueError(f"logit_bias must be below infinity, got {bias} of id {token}")

    @property
    def has_penalty(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def is_plain(self) -> bool:
        """Tokens depend on the model's logits and the sampling options alone."""
        return not (
            self.has_penalty or self.logit_bias or self.min_tokens or self.logprobs is not None
        )


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of one token, and the most likely tokens with theirs, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Request:
    """One continuation of one prompt.

    Attributes:
      prompt: ids.
      sampling: a `SamplingOptions`.
      stop_ids: ids that end it.
      deadline: seconds of the engine's clock.
      finish_reason: None while it runs; "stop" at an end token, "length" at max_new_tokens,
        "abort", "timeout", or "error" where its logits are not finite.
      logprobs: of every token, where options.logprobs asks for them.
      num_hit_tokens: tokens found in the prefix cache when it was first admitted.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Any = None,
        options: RequestOptions | None = None,
        fork_of: Request | None = None,
        deadline: float | None = None,
        stop_ids: Collection[int] = (),
    ):
        check_positive(max_new_tokens=max_new_tokens)
        self.prompt = tuple(prompt)
        if not self.prompt:
            raise ValueError("a prompt must have at least 1 token, got none")
        self.max_new_tokens, self.sampling = int(max_new_tokens), sampling
        self.options = RequestOptions() if options is None else options
        self.deadline, self.stop_ids = deadline, frozenset(stop_ids)
        num_biased, num_stops = len(self.options.logit_bias), len(self.stop_ids)
        if num_biased + num_stops > MAX_BIASED_TOKENS:
            raise ValueError(
                f"logit_bias and the stop ids must be at most {MAX_BIASED_TOKENS} ids, got "
                f"{num_biased} and {num_stops}"
            )
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.num_hit_tokens: int | None = None

        # The scheduler's. A request that runs holds a slot, and in `table` its pages.
        self.fork_of = fork_of
        self.arrival = -1
        self.ids = list(self.prompt)  # and what is written and read back
        self.slot: int | None = None
        self.table: list[int] = []
        self.page_keys: list[bytes] = []  # of its full pages, as far as their tokens are known
        self.num_cached = 0  # tokens whose rows are in the cache once all planned steps have run
        self.num_chunked = 0  # tokens that come in chunks; those after them are decoded
        self.num_unread = 0  # tokens chosen by planned steps and not read back

    @property
    def tokens(self) -> list[int]:
        """The continuation as far as it is read back, its end token included."""
        return self.ids[len(self.prompt) :]

    @property
    def num_tokens(self) -> int:
        """Prompt and continuation, with tokens that are not read back."""
        return len(self.ids) + self.num_unread

    @property
    def max_tokens(self) -> int:
        """Rows that it may need in the cache: the last token is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def order(self) -> tuple[int, int]:
        """Lower is served first."""
        return -self.options.priority, self.arrival

    @property
    def is_prefilling(self) -> bool:
        return self.slot is not None and self.num_cached < self.num_chunked

    @property
    def has_prompt(self) -> bool:
        """Its prompt but for one token is in the cache: forks can share it."""
        return self.slot is not None and not self.is_prefilling

    @property
    def is_decoding(self) -> bool:
        """Has a token to feed, and is not known to be at its end."""
        return (
            self.slot is not None
            and self.num_chunked <= self.num_cached < self.num_tokens
            and self.num_cached < self.max_tokens
        )


def _check_range(name: str, value: Any, low: int, high: int | None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")
