"""The HTTP surface with an engine that writes what it is told to: shapes, limits, refusals."""

import asyncio
import json

import httpx
import pytest

from jax_mla.serving import Event, Request, Stats, TokenLogprobs
from jax_mla.serving.server.app import Limits, Server, make_app
from jax_mla.text import ByteTokenizer, ChatTemplate
from jax_mla.text.chat_template import PLAIN_TEMPLATE
from jax_mla.text.tokenizer import BYTE_EOS

STATS = Stats(1, 2, 16, 3, 4, 5, 6, 7, 8, 9, 10, 0, {"stop": 11})


class Script:
    """An engine that writes a text, and then stops, or goes on forever."""

    def __init__(self, text="a €5 note", ending="stop", forever=False):
        self.ids, self.ending, self.forever = list(text.encode()), ending, forever
        self.submitted, self.closed = [], 0

    async def stream(self, prompt, sampling=None, *, n=1, max_new_tokens, options=None):
        requests = [Request(prompt, max_new_tokens=max_new_tokens) for _ in range(n)]
        self.submitted.append((prompt, sampling, options, max_new_tokens))
        try:
            if self.ending == "refuse":
                raise ValueError("token ids must be below 259, got 999")
            if self.ending == "fail":
                raise RuntimeError("the engine has failed")
            logprobs = None
            if options.logprobs is not None:
                logprobs = TokenLogprobs(-0.5, ((97, -0.5), (98, -float("inf"))))
            for token in self.ids:
                for i, request in enumerate(requests):
                    request.num_hit_tokens = 2
                    yield i, Event(request, token, None, logprobs)
            while self.forever:
                await asyncio.sleep(0.001)
                yield 0, Event(requests[0], 97, None)
            for i, request in enumerate(requests):
                token = BYTE_EOS if self.ending == "stop" else None
                yield i, Event(request, token, self.ending)
        finally:
            self.closed += 1

    async def stats(self):
        if self.ending == "fail":
            raise RuntimeError("the engine has failed")
        return STATS


def served(script, **arguments):
    limits = Limits(max_tokens=1000, max_body_bytes=10_000, max_n=4, max_waiting=8)
    arguments = {"limits": limits, "template": ChatTemplate(PLAIN_TEMPLATE)} | arguments
    return Server(script, ByteTokenizer(), "demo", **arguments)


def call(server, path, body=None, headers=None, data=None):
    async def main():
        transport = httpx.ASGITransport(make_app(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            if body is None and data is None:
                return await client.get(path, headers=headers)
            content = json.dumps(body).encode() if data is None else data
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(main())


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
PROMPT = {"model": "demo", "prompt": "Hello"}


def chunks(answer):
    *events, done, rest = answer.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_chat():
    script = Script()
    answer = call(served(script), CHAT, HELLO | {"n": 2, "seed": -1, "temperature": 0.5})
    body = answer.json()
    assert answer.status_code == 200 and body["object"] == "chat.completion"
    assert [c["index"] for c in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["content"] == "a €5 note" and choice["finish_reason"] == "stop"
    prompt, sampling, options, _ = script.submitted[0]
    assert prompt == ByteTokenizer().encode("Hello") and sampling.temperature == 0.5
    assert options.seed == 2**32 - 1
    assert body["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


def test_a_streamed_chat():
    body = HELLO | {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    answer = call(served(Script()), CHAT, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *parts, last = chunks(answer)
    for index in (0, 1):
        own = [p["choices"][0] for p in parts if p["choices"][0]["index"] == index]
        assert [c["delta"].get("role") for c in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(c["delta"].get("content", "") for c in own) == "a €5 note"
        assert not any("\ufffd" in c["delta"].get("content", "") for c in own)
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["stop"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_that_would_go_on(stream):
    script = Script(forever=True)
    answer = call(served(script), TEXT, PROMPT | {"stop": [" note", "no"], "stream": stream})
    found = chunks(answer) if stream else [answer.json()]
    choices = [choice for part in found for choice in part["choices"]]
    assert "".join(c["text"] for c in choices) == "a €5 " and script.closed == 1
    assert choices[-1]["finish_reason"] == "stop"


def test_logprobs_of_both_kinds():
    answer = call(served(Script("ab")), CHAT, HELLO | {"logprobs": True, "top_logprobs": 2})
    first, _ = answer.json()["choices"][0]["logprobs"]["content"]
    assert first["token"] == "a" and first["logprob"] == -0.5 and first["bytes"] == [97]
    assert [t["logprob"] for t in first["top_logprobs"]] == [-0.5, -9999]
    answer = call(served(Script("ab")), TEXT, PROMPT | {"logprobs": 2, "stream": True})
    found = [c["logprobs"] for p in chunks(answer) for c in p["choices"] if c["logprobs"]]
    assert [one["tokens"] for one in found] == [["a"], ["b"]]
    assert [one["text_offset"] for one in found] == [[0], [1]]


@pytest.mark.parametrize(
    ("ending", "status"),
    [("timeout", 408), ("abort", 503), ("error", 500), ("fail", 500), ("refuse", 400)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_did_not_end_well_is_no_answer(ending, status, stream):
    text = "" if ending in ("fail", "refuse") else "abc"
    server = served(Script(text, ending), limits=Limits(1000, timeout_s=5))
    answer = call(server, CHAT, HELLO | {"stream": stream})
    if stream and text:
        assert "[DONE]" not in answer.text
        error = json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == status
        error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and server.num_active == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 2000}, "messages"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": "\udc00"}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 200}}, "logit_bias.1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": []}, None),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"cache_salt": 3}, "cache_salt"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, param):
    script = Script()
    answer = call(served(script), CHAT, HELLO | change)
    if param is None:  # as good as absent
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert error["message"].startswith(param) and not script.submitted


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b'{"a":1,"a":2}'])
def test_bodies_that_are_no_objects(data):
    answer = call(served(Script()), CHAT, data=data)
    assert answer.status_code == 400 and "the body" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [None, [], "", [1.5], ["a", "b"], [True], [[]], {}])
def test_prompts_that_are_none(prompt):
    answer = call(served(Script()), TEXT, PROMPT | {"prompt": prompt})
    wanted = 200 if prompt == "" else 400  # an empty text is the beginning of one
    assert answer.status_code == wanted


def test_ids_are_a_prompt():
    script = Script()
    call(served(script), TEXT, PROMPT | {"prompt": [[1, 2, 3]], "user": "me", "unknown": 1})
    assert script.submitted[0][0] == [1, 2, 3] and script.submitted[0][3] == 16


def test_limits():
    server = served(Script())
    assert call(server, CHAT, data=b" " * 10_001).status_code == 413
    answer = call(server, CHAT, HELLO | {"model": "other"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    server.num_active = 7
    answer = call(server, CHAT, HELLO | {"n": 2})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert call(served(Script(), template=None), CHAT, HELLO).status_code == 400


def test_keys():
    script = Script()
    server = served(script, api_keys=["one", "two"])
    for path in ("/v1/models", "/v1/models/demo"):
        assert call(server, path).status_code == 401
    for header in ("", "Bearer", "Bearer three", "Basic one", "Bearer onee"):
        answer = call(server, CHAT, HELLO, {"Authorization": header})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    for key in ("one", "two", "one"):
        assert call(server, CHAT, HELLO, {"Authorization": f"Bearer {key}"}).status_code == 200
    first, second, third = (options.cache_salt for _, _, options, _ in script.submitted)
    assert first == third != second and "one" not in first


def test_other_routes():
    server = served(Script())
    assert call(server, "/v1/models").json()["data"][0]["id"] == "demo"
    assert call(server, "/v1/models/demo").json()["object"] == "model"
    assert call(server, "/v1/models/x/y").status_code == 404
    assert call(server, "/tokenize", {"prompt": "A"}).json()["tokens"] == [256, 65]
    assert call(server, "/tokenize", {"messages": HELLO["messages"]}).json()["count"] == 6
    assert call(server, "/health").json() == {"status": "ok"}
    assert call(server, "/ready").status_code == 200
    assert call(served(Script("", "fail")), "/ready").status_code == 503
    text = call(server, "/metrics").text
    assert "jax_mla_waiting 2.0" in text and 'finished_requests_total{reason="stop"} 11.0' in text
    assert "generated_tokens_total 7.0" in text
    answer = call(server, "/nothing")
    assert answer.status_code == 404 and "/nothing" in answer.json()["error"]["message"]
    assert call(server, CHAT).status_code == 405
    page = call(server, "/").text
    assert page.startswith("<!doctype html>") and "http://" not in page and "https://" not in page


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_engine(stream):
    script = Script(forever=True)
    server = served(script)
    body = json.dumps(HELLO | {"stream": stream}).encode()
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}

    async def main():
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        task = asyncio.create_task(make_app(server)(scope, receive, send))
        while not script.submitted:
            await asyncio.sleep(0.001)
        assert server.num_active == 1
        gone.set()
        await asyncio.wait_for(task, 5)

    asyncio.run(main())
    assert script.closed == 1 and server.num_active == 0
