"""What is answered, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from jax_mla.serving.request import TokenLogprobs
from jax_mla.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """The body of an error; a stream that has begun sends it as its last object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_sentence(status: int) -> str:
    """What HTTP calls a status."""
    return HTTPStatus(status).phrase


def as_event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def usage(num_prompt: int, num_new: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class Shape:
    """Objects of one answer: its id, time and model, as a chat or as a completion."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._common | {"object": kind, "choices": list(choices), "usage": usage}

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A part of a streamed answer."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        value = self._common | {"object": kind, "choices": list(choices)}
        return value if usage is None else value | {"usage": usage}

    def choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: Any
    ) -> dict[str, Any]:
        """A continuation of a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": message} if self._is_chat else {"text": text}
        return {"index": index, **content, "finish_reason": finish_reason, "logprobs": logprobs}

    def delta(
        self, index: int, text: str | None, finish_reason: str | None, logprobs: Any, role: bool
    ) -> dict[str, Any]:
        """What a chunk adds to a continuation; the first one says the role."""
        delta = {"role": "assistant"} if role else {}
        delta |= {} if text is None else {"content": text}
        content = {"delta": delta} if self._is_chat else {"text": text or ""}
        return {"index": index, **content, "finish_reason": finish_reason, "logprobs": logprobs}

    def logprobs(
        self, tokenizer: Tokenizer, tokens: Sequence[tuple[int, TokenLogprobs]], offset: int = 0
    ) -> dict[str, Any]:
        """Log probabilities of tokens; `offset` counts the characters before the first one."""
        if self._is_chat:
            return {
                "content": [
                    _token(tokenizer, token, one.logprob)
                    | {"top_logprobs": [_token(tokenizer, *pair) for pair in one.top]}
                    for token, one in tokens
                ],
                "refusal": None,
            }
        texts = [tokenizer.decode([token]) for token, _ in tokens]
        lengths = [0, *map(len, texts)]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for _, one in tokens],
            "top_logprobs": [
                {tokenizer.decode([token]): _finite(value) for token, value in reversed(one.top)}
                for _, one in tokens
            ],
            "text_offset": [offset + sum(lengths[: i + 1]) for i in range(len(texts))],
        }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # OpenAI's number for what cannot happen
