"""One request from its submission to its last byte, or until its client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from jax_mla.serving.events import Event
from jax_mla.serving.server import responses
from jax_mla.serving.server.choice import Choice
from jax_mla.serving.server.protocol import Asked, BadRequest
from jax_mla.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jax_mla.serving.front import AsyncEngine

_LOG = logging.getLogger("jax_mla")


@dataclasses.dataclass
class Answer:
    """An ASGI application that answers one request, and stops the engine's work on it when the
    client goes away.

    Args:
      prompt: ids.
      max_new_tokens: of each continuation.
      on_end: called once, whatever happened.
    """

    front: AsyncEngine
    tokenizer: Tokenizer
    prompt: Sequence[int]
    asked: Asked
    max_new_tokens: int
    model: str
    is_chat: bool
    on_end: Callable[[], None]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._has_begun = False
        try:
            await _until_gone(receive, self._reply(send))
        finally:
            self.on_end()

    async def _reply(self, send: Any) -> None:
        try:
            await (self._stream(send) if self.asked.stream else self._whole(send))
        except ValueError as error:  # of the engine, at submission
            status = error.status if isinstance(error, BadRequest) else 400
            await self._fail(send, str(error), status)
        except RuntimeError as error:
            _LOG.error("%s", error, exc_info=error.__cause__)
            await self._fail(send, "the engine has failed", 500)

    def _events(self) -> AsyncIterator[tuple[int, Event]]:
        return self.front.stream(
            self.prompt,
            self.asked.sampling,
            n=self.asked.n,
            max_new_tokens=self.max_new_tokens,
            options=self.asked.options,
        )

    def _choices(self) -> list[Choice]:
        return [Choice(self.tokenizer, self.prompt, self.asked.stop) for _ in range(self.asked.n)]

    async def _fed(self, choices: list[Choice]) -> AsyncGenerator[tuple[int, str, Event], None]:
        """Continuation, new text and event, until all continuations are finished."""
        async with contextlib.aclosing(self._events()) as events:  # pyright: ignore
            async for index, event in events:
                if choices[index].finish_reason is not None:
                    continue  # its stop string was found before
                piece = choices[index].feed(event)
                _check_end(choices[index].finish_reason, self.asked.options.timeout_s)
                yield index, piece, event
                if all(choice.finish_reason is not None for choice in choices):
                    return

    async def _whole(self, send: Any) -> None:
        choices, num_cached = self._choices(), 0
        async with contextlib.aclosing(self._fed(choices)) as fed:
            async for _, _, event in fed:
                num_cached = max(num_cached, event.request.num_hit_tokens or 0)
        shape = responses.Shape(self.model, is_chat=self.is_chat)
        bodies = []
        for i, choice in enumerate(choices):
            logprobs = None
            if self.asked.options.logprobs is not None:
                logprobs = shape.logprobs(self.tokenizer, choice.logprobs)
            bodies.append(shape.choice(i, choice.text, choice.finish_reason, logprobs))
        await send_json(send, 200, shape.whole(bodies, self._usage(choices, num_cached)))

    async def _stream(self, send: Any) -> None:
        shape, choices = responses.Shape(self.model, is_chat=self.is_chat), self._choices()
        num_cached, has_role, num_shown = 0, set(), [0] * len(choices)
        async with contextlib.aclosing(self._fed(choices)) as fed:
            async for index, piece, event in fed:
                choice = choices[index]
                num_cached = max(num_cached, event.request.num_hit_tokens or 0)
                if not self._has_begun:
                    await self._begin(send)
                logprobs = None
                if self.asked.options.logprobs is not None and event.logprobs is not None:
                    new = choice.logprobs[num_shown[index] :]
                    num_shown[index] = len(choice.logprobs)
                    logprobs = shape.logprobs(self.tokenizer, new, len(choice.text) - len(piece))
                if piece or logprobs:
                    is_first = index not in has_role
                    has_role.add(index)
                    delta = shape.delta(index, piece, None, logprobs, is_first)
                    await self._put(send, responses.as_event(shape.chunk([delta])))
                if choice.finish_reason is not None:
                    is_first = index not in has_role
                    last = shape.delta(index, None, choice.finish_reason, None, is_first)
                    await self._put(send, responses.as_event(shape.chunk([last])))
        if self.asked.include_usage:
            chunk = shape.chunk([], self._usage(choices, num_cached))
            await self._put(send, responses.as_event(chunk))
        await self._put(send, responses.DONE, more=False)

    def _usage(self, choices: list[Choice], num_cached: int) -> dict[str, Any]:
        num_new = sum(choice.num_tokens for choice in choices)
        return responses.usage(len(self.prompt), num_new, num_cached)

    async def _begin(self, send: Any) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _put(self, send: Any, data: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _fail(self, send: Any, message: str, status: int) -> None:
        body = responses.error(message, status)
        if self._has_begun:
            await self._put(send, responses.as_event(body), more=False)
        else:
            await send_json(send, status, body)


async def send_json(send: Any, status: int, body: dict[str, Any]) -> None:
    """Sends a whole answer."""
    data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def _check_end(finish_reason: str | None, timeout_s: float | None) -> None:
    """Nobody shall take for an answer what ended for the server's reasons."""
    if finish_reason == "timeout":
        raise BadRequest(f"the answer was not complete after {timeout_s:g} s", status=408)
    if finish_reason == "abort":
        raise BadRequest("the server is shutting down", status=503)
    if finish_reason == "error":
        raise BadRequest("the model's logits were not finite", status=500)


async def _until_gone(receive: Any, work: Coroutine[Any, Any, None]) -> None:
    """Runs work to its end, or until the client has disconnected."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    error = results[0]
    if isinstance(error, Exception) and not isinstance(error, OSError):  # a broken connection
        raise error
