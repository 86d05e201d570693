"""The engine behind asyncio: a thread that steps, and an iterator of events per request."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jax_mla.generation.sampling import SamplingOptions
from jax_mla.serving.engine import Engine
from jax_mla.serving.events import Event, Stats
from jax_mla.serving.request import Request, RequestOptions

_Command = tuple[Callable[[], Any], concurrent.futures.Future[Any]]


class AsyncEngine:
    """Lets many coroutines use one engine, which nobody else may touch meanwhile.

    A context manager: the thread starts with it, and ends with it. Requests that run then are
    aborted.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._listeners: dict[Request, Callable[[Event | Exception], None]] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="jax-mla engine", daemon=True)

    def __enter__(self) -> AsyncEngine:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._commands.put(None)
        self._thread.join()

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        n: int = 1,
        max_new_tokens: int,
        options: RequestOptions | None = None,
    ) -> AsyncIterator[tuple[int, Event]]:
        """The events of n continuations of a prompt, each with the number of its continuation.

        Ends with the last of them. A caller that stops iterating aborts them: use
        `contextlib.aclosing`, or cancel the task.

        Args:
          prompt, sampling, n, max_new_tokens, options: as in `Engine.submit_many`.

        Raises:
          ValueError: as `Engine.submit`.
          RuntimeError: a step has failed, and with it the engine; its error is the cause.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def listen(event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        def submit() -> list[Request]:
            arguments = {"n": n, "max_new_tokens": max_new_tokens, "options": options}
            requests = self._engine.submit_many(prompt, sampling, **arguments)
            self._listeners.update(dict.fromkeys(requests, listen))
            return requests

        submitted = self._call(submit)
        requests: list[Request] = []
        try:
            requests = await asyncio.shield(asyncio.wrap_future(submitted))
            left = set(requests)
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise RuntimeError("the engine has failed") from event
                if event.finish_reason is not None:
                    left.remove(event.request)
                yield requests.index(event.request), event
        finally:
            self._commands.put((lambda: self._abort(submitted), concurrent.futures.Future()))

    async def stats(self) -> Stats:
        """Where the engine stands between two steps."""
        return await asyncio.wrap_future(self._call(lambda: self._engine.stats))

    def _call(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Runs a function between two steps."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread does not run: use `with AsyncEngine(...)`")
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._commands.put((function, done))
        return done

    def _abort(self, submitted: concurrent.futures.Future[list[Request]]) -> None:
        if submitted.exception() is None:
            for request in submitted.result():
                self._listeners.pop(request, None)
                self._engine.abort(request)

    def _serve(self) -> None:
        while self._run_commands():
            if self._failure is not None:
                continue
            try:
                events = self._engine.step()
            except Exception as error:
                self._failure = error
                for listen in self._listeners.values():
                    listen(error)
                continue
            for event in events:
                if event.request in self._listeners:
                    self._listeners[event.request](event)
                if event.finish_reason is not None:
                    self._listeners.pop(event.request, None)

    def _run_commands(self) -> bool:
        """Runs what was asked for, and waits for it while there is nothing to compute."""
        while True:
            try:
                is_idle = self._engine.is_idle or self._failure is not None
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                for request, listen in self._listeners.items():
                    self._engine.abort(request)
                    listen(Event(request, None, "abort"))
                return False
            function, done = command
            try:
                if self._failure is not None:
                    raise RuntimeError("the engine has failed") from self._failure
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)
