"""Routes, keys and limits of the server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import importlib.resources
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jax_mla.checks.sizes import check_positive
from jax_mla.serving.server import metrics, responses
from jax_mla.serving.server.answer import Answer
from jax_mla.serving.server.protocol import (
    BadRequest,
    parse_asked,
    parse_body,
    parse_messages,
    parse_prompt,
)
from jax_mla.text.chat_template import ChatTemplate
from jax_mla.text.tokenizer import ByteTokenizer, JsonTokenizer

if TYPE_CHECKING:
    from jax_mla.serving.front import AsyncEngine


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client, or all of them together, may ask for.

    Attributes:
      max_tokens: of prompt and answer together.
      max_body_bytes: of a request.
      max_n: continuations of one request.
      max_waiting: continuations in the server at once, those that run included; more are told to
        come back later.
      timeout_s: after which a request ends; None waits forever.
    """

    max_tokens: int
    max_body_bytes: int = 4 * 2**20
    max_n: int = 16
    max_waiting: int = 256
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "timeout_s"}
        check_positive(**sizes)
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0 or None, got {self.timeout_s!r}")


@dataclasses.dataclass
class Server:
    """The handlers, and how many continuations they work on.

    Args:
      name: of the model, which requests must name.
      template: None where the model has none; chats are refused then.
      api_keys: of which requests must carry one; none lets everyone in.
    """

    front: AsyncEngine
    tokenizer: ByteTokenizer | JsonTokenizer
    name: str
    limits: Limits
    template: ChatTemplate | None = None
    api_keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._started = int(time.time())
        self.num_active = 0

    async def chat(self, request: Request) -> Any:
        return await self._generate(request, is_chat=True)

    async def complete(self, request: Request) -> Any:
        return await self._generate(request, is_chat=False)

    async def _generate(self, request: Request, *, is_chat: bool) -> Answer:
        salt = self._salt(request)
        body = await self._body(request)
        asked = parse_asked(
            body,
            is_chat=is_chat,
            max_n=self.limits.max_n,
            salt=salt,
            timeout_s=self.limits.timeout_s,
        )
        self._check_model(asked.model)
        prompt = self._chat_ids(body) if is_chat else self._prompt_ids(body)
        room = self.limits.max_tokens - len(prompt)
        max_new = room if asked.max_new_tokens is None else asked.max_new_tokens
        if room < 1 or max_new > room:
            raise BadRequest(
                f"{'messages' if is_chat else 'prompt'} must leave room for the answer in "
                f"{self.limits.max_tokens} tokens, got {len(prompt)} tokens and {max(max_new, 1)} "
                "to write",
                "messages" if is_chat else "prompt",
                code="context_length_exceeded",
            )
        if self.num_active + asked.n > self.limits.max_waiting:
            raise BadRequest(
                f"the queue is full: {self.num_active} of {self.limits.max_waiting} places are "
                f"taken, and {asked.n} were asked for",
                status=429,
            )
        self.num_active += asked.n

        def leave() -> None:
            self.num_active -= asked.n

        return Answer(self.front, self.tokenizer, prompt, asked, max_new, self.name, is_chat, leave)

    async def tokenize(self, request: Request) -> Response:
        self._salt(request)
        body = await self._body(request)
        ids = self._chat_ids(body) if "messages" in body else self._prompt_ids(body)
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": self.limits.max_tokens}
        )

    async def models(self, request: Request) -> Response:
        self._salt(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._salt(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        try:
            await self.front.stats()
        except RuntimeError:
            return JSONResponse({"status": "the engine does not run"}, 503)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        text = metrics.exposition(await self.front.stats())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        html = importlib.resources.files("jax_mla.serving.server") / "page.html"
        return HTMLResponse(html.read_text(encoding="utf-8"))

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._started,
            "owned_by": "jax-mla",
            "max_model_len": self.limits.max_tokens,
        }

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise BadRequest(
                f"model must be {self.name!r}, got {name[:80]!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def _salt(self, request: Request) -> str:
        """Lets in who has a key; what keeps its cached pages apart from those of other keys."""
        if not self.api_keys:
            return ":"
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(key.strip().encode(), own.encode()) for own in self.api_keys]
        if kind.lower() != "bearer" or not any(found):
            raise BadRequest(
                "the header Authorization must be 'Bearer' and a key of this server",
                status=401,
                code="invalid_api_key",
            )
        return hashlib.sha256(key.strip().encode()).hexdigest() + ":"

    async def _body(self, request: Request) -> dict[str, Any]:
        limit, body = self.limits.max_body_bytes, bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise BadRequest(f"the body must be at most {limit} bytes", status=413)
        return parse_body(bytes(body))

    def _chat_ids(self, body: dict[str, Any]) -> list[int]:
        if self.template is None:
            raise BadRequest(
                f"{self.name} has no chat template; /v1/completions continues texts", "messages"
            )
        variables = body.get("chat_template_kwargs") or {}
        if not isinstance(variables, dict) or "messages" in variables:
            raise BadRequest(
                "chat_template_kwargs must be an object without messages", "chat_template_kwargs"
            )
        messages = parse_messages(body)
        try:
            text = self.template.render(messages, **variables)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from None
        return self.tokenizer.encode_chat(text)

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        prompt = parse_prompt(body)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise BadRequest("prompt must have at least one token, got ''", "prompt")
        return ids


def make_app(
    server: Server,
    *,
    lifespan: Callable[[Any], contextlib.AbstractAsyncContextManager[None]] | None = None,
) -> Starlette:
    """The routes of a server as an ASGI application."""
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/health", server.health),
        Route("/ready", server.ready),
        Route("/metrics", server.metrics),
        Route("/", server.page),
    ]
    handlers: dict[Any, Any] = {
        BadRequest: _bad_request,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan or _nothing)


async def _bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    body = responses.error(str(error), error.status, error.param, error.code)
    return JSONResponse(body, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(
        responses.error(sentence, error.status_code), error.status_code, error.headers
    )


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


@contextlib.asynccontextmanager
async def _nothing(app: Any) -> AsyncIterator[None]:
    yield
