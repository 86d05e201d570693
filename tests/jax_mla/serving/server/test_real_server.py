"""`jax-mla serve` as a process with the bundled model, asked by OpenAI's own client."""

import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from jax_mla.cli.main import main

pytestmark = pytest.mark.slow  # compiles the programs of a server

SERVE = [sys.executable, "-m", "jax_mla", "serve", "--port", "0", "--max-batch", "2"]
MESSAGES = [{"role": "user", "content": "And it came to pass"}]


@pytest.fixture(scope="module")
def address():
    command = [*SERVE, "--num-pages", "32", "--max-tokens", "512", "--paranoid"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not (found := re.search(r"demo at (http://127\.0\.0\.1:\d+)", "".join(lines))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        yield found[1]
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
        assert "Traceback" not in rest and "came to pass" not in rest
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def metric(address, name):
    text = httpx.get(f"{address}/metrics").text
    return float(re.search(rf"^jax_mla_{name} (\S+)$", text, re.MULTILINE)[1])


def test_chat_and_stream_agree(client):
    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    texts, usage, reasons = ["", ""], None, [None, None]
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert [choice.message.content for choice in whole.choices] == texts and texts[0]
    assert [choice.finish_reason for choice in whole.choices] == reasons
    assert whole.usage.completion_tokens == usage.completion_tokens


def test_completions_and_models(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    asked = {"model": "demo", "prompt": "And it came to pass", "temperature": 0}
    text = client.completions.create(**asked, max_tokens=60).choices[0].text
    stop = text[20:24]
    cut = client.completions.create(**asked, max_tokens=60, stop=stop).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=5)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=MESSAGES)


def test_who_leaves_frees_pages(client, address):
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=450, stream=True, logit_bias={"257": -100}
    )
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 30
    while metric(address, "pages_in_use"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert metric(address, "recompiles_total") == 0


def test_a_port_in_use_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err
