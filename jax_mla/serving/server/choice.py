"""Tokens of one continuation to text, up to its stop string."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax_mla.serving.events import Event
from jax_mla.serving.request import TokenLogprobs
from jax_mla.serving.stop import StopStrings
from jax_mla.text.stream import TextStream
from jax_mla.text.tokenizer import Tokenizer


@dataclasses.dataclass
class Choice:
    """One continuation as far as it has come.

    Attributes:
      finish_reason: that of the engine, or "stop" once a stop string was found.
      logprobs: (token, log probabilities) of every token.
    """

    tokenizer: Tokenizer
    prompt: Sequence[int]
    stops: Sequence[str]

    def __post_init__(self) -> None:
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.logprobs: list[tuple[int, TokenLogprobs]] = []
        self._stream = TextStream(self.tokenizer, self.prompt)
        self._stops = StopStrings(self.stops)

    def feed(self, event: Event) -> str:
        """The text that an event makes certain; nothing once the continuation is finished."""
        if self.finish_reason is not None:
            return ""
        piece = ""
        if event.token is not None:
            self.num_tokens += 1
            if event.logprobs is not None:
                self.logprobs.append((event.token, event.logprobs))
            piece = self._stops.feed(self._stream.feed(event.token))
        if event.finish_reason is not None:
            piece += self._stops.feed(self._stream.end())
            piece += self._stops.end()
        self.finish_reason = event.finish_reason if self._stops.found is None else "stop"
        self.text += piece
        return piece
