"""Bodies of requests: checked, and turned into what the engine takes."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping
from typing import Any

from jax_mla.checkpoint.files import parse_json
from jax_mla.generation.sampling import SamplingOptions
from jax_mla.serving.request import MAX_TOP_LOGPROBS, RequestOptions

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
# Of fields that change the answer and are not supported, the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_ROLES = ("system", "developer", "user", "assistant")


class BadRequest(ValueError):
    """A client's mistake, in one sentence.

    Attributes:
      param: the field that it is about.
      status, code: as HTTP and OpenAI name it.
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body of /v1/completions or /v1/chat/completions, apart from its prompt.

    Attributes:
      max_new_tokens: None for as many as fit.
      stop: strings that end the text.
      include_usage: a stream ends with the numbers of tokens.
    """

    model: str
    n: int
    max_new_tokens: int | None
    sampling: SamplingOptions
    options: RequestOptions
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


class Fields:
    """Reads typed fields of a body; null counts as absent."""

    def __init__(self, body: Mapping[str, Any], inside: str = "") -> None:
        self._body, self._inside = body, inside

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        return check_text(value, self._inside + name)

    def flag(self, name: str) -> bool:
        value = self._value(name, False)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self._value(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._value(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def table(self, name: str) -> dict[str, Any]:
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def raw(self, name: str) -> Any:
        return self._body.get(name)

    def _value(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def _wrong(self, name: str, allowed: str, value: Any) -> BadRequest:
        name = self._inside + name
        return BadRequest(f"{name} must be {allowed}, got {shown(value)}", name)


def shown(value: Any) -> str:
    """A value for an error message, not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_text(text: str, name: str) -> str:
    """The text, which must be UTF-8: JSON can name halves of characters."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRequest(f"{name} must be UTF-8, got {shown(text)}", name)
    return text


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        return parse_json(body, "the body")
    except ValueError as error:
        raise BadRequest(str(error)) from None


def parse_asked(
    body: Mapping[str, Any], *, is_chat: bool, max_n: int, salt: str, timeout_s: float | None
) -> Asked:
    """All fields but the prompt.

    Args:
      max_n: continuations that one request may ask for.
      salt: put before the client's cache_salt.
      timeout_s: after which a request ends.

    Raises:
      BadRequest: a field is malformed, or asks for what is not supported; it names the field.
    """
    fields = Fields(body)
    for name, harmless in _UNSUPPORTED.items():
        value = fields.raw(name)
        if value is not None and value not in harmless:
            raise BadRequest(f"{name} is not supported, got {shown(value)}", name)
    max_int = 2**31 - 1
    max_new = fields.integer("max_completion_tokens", None, 1, max_int)
    older = fields.integer("max_tokens", None if is_chat else 16, 1, max_int)
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    top_k = fields.integer("top_k", None, -1, max_int)
    top_p, min_p = fields.number("top_p", 1, 0, 1), fields.number("min_p", 0, 0, 1)
    stream_options = Fields(fields.table("stream_options"), "stream_options.")
    try:
        sampling = SamplingOptions(
            temperature=fields.number("temperature", 1, 0, 2),
            top_k=top_k if top_k is not None and top_k > 0 else None,
            top_p=top_p if top_p > 0 else 1e-9,  # 0 leaves the most likely token
            min_p=min_p if min_p > 0 else None,
        )
        options = RequestOptions(
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            min_tokens=fields.integer("min_tokens", 0, 0, max_int) or 0,
            logprobs=_num_logprobs(fields, is_chat),
            repetition_penalty=fields.number("repetition_penalty", 1, 1e-3, 1e3),
            presence_penalty=fields.number("presence_penalty", 0, -2, 2),
            frequency_penalty=fields.number("frequency_penalty", 0, -2, 2),
            logit_bias=_logit_bias(fields),
            timeout_s=timeout_s,
            cache_salt=salt + fields.text("cache_salt", ""),
        )
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(str(error)) from None
    return Asked(
        model=fields.text("model", ""),
        n=fields.integer("n", 1, 1, max_n) or 1,
        max_new_tokens=older if max_new is None else max_new,
        sampling=sampling,
        options=options,
        stop=_stop(fields.raw("stop")),
        stream=fields.flag("stream"),
        include_usage=stream_options.flag("include_usage"),
    )


def parse_messages(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a chat, each with role and content, whose text parts are joined."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"messages must be a list, got {shown(messages)}", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def parse_prompt(body: Mapping[str, Any]) -> str | list[int]:
    """The only prompt of a completion: a text or token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return check_text(prompt, "prompt")
    if isinstance(prompt, list) and prompt:
        if all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
            return prompt
    raise BadRequest(f"prompt must be one string or list of ids, got {shown(prompt)}", "prompt")


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRequest(f"{name} must be an object, got {shown(message)}", name)
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise BadRequest(f"{name}.role must be one of {allowed}, got {shown(role)}", f"{name}.role")
    for unsupported in ("tool_calls", "function_call", "audio"):
        if message.get(unsupported):
            raise BadRequest(f"{name}.{unsupported} is not supported", f"{name}.{unsupported}")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        allowed = f"{name}.content must be a string or a list of text parts"
        raise BadRequest(f"{allowed}, got {shown(content)}", f"{name}.content")
    return {"role": role, "content": check_text(content, f"{name}.content")}


def _part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise BadRequest(f"{name} must be a part of type text, got {shown(part)}", name)
    return text


def _num_logprobs(fields: Fields, is_chat: bool) -> int | None:
    if not is_chat:
        return fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        raise BadRequest(f"top_logprobs must come with logprobs true, got {top}", "top_logprobs")
    return None


def _logit_bias(fields: Fields) -> dict[int, float]:
    biases = {}
    for word in fields.table("logit_bias"):
        if not word.isascii() or not word.isdecimal() or len(word) > 10:
            raise BadRequest(f"logit_bias must name token ids, got {shown(word)}", "logit_bias")
        inside = Fields(fields.table("logit_bias"), "logit_bias.")
        bias = inside.number(word, math.nan, -100, 100)
        biases[int(word)] = -math.inf if bias == -100 else bias
    return biases


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_list or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        raise BadRequest(
            f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters, "
            f"got {shown(value)}",
            "stop",
        )
    return tuple(check_text(stop, "stop") for stop in stops)
