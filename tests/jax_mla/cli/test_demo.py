"""`jax-mla demo`: the bundled model writes English, offline, and the sums it prints are right."""

import contextlib
import io
import json

import pytest

from jax_mla.cli.main import main

PROMPT = "And the LORD spake unto"


@pytest.fixture(scope="module")
def shown():
    """What the command prints for two prompts at temperature 0."""
    words = ["--max-new-tokens", "64", "--temperature", "0", "--prompt", PROMPT, "--prompt", "He"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["demo", *words, "--json"]) == 0
    return json.loads(out.getvalue())


def test_json_schema(shown):
    assert set(shown) == {
        "completions", "tokens_per_second", "compile_seconds", "cache_bytes_per_token", "device"
    }  # fmt: skip
    assert [one["prompt"] for one in shown["completions"]] == [PROMPT, "He"]
    assert shown["tokens_per_second"] > 0 <= shown["compile_seconds"]


def test_text_reads_like_english(shown):
    text = shown["completions"][0]["text"]
    words = text.replace(",", " ").replace(".", " ").replace(":", " ").lower().split()
    assert {"the", "and", "of", "unto", "lord", "moses", "to", "i", "in"} & set(words[:8]), text
    assert text.replace("\n", " ").isprintable(), text


def test_cache_is_smaller_than_that_of_multi_head_attention(shown):
    cache = shown["cache_bytes_per_token"]
    assert 1 < cache["ratio"] == cache["mha"] / cache["latent"]


def test_text_output(capsys):
    assert main(["demo", "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert "tokens/s on " in out and "bytes per token; multi-head attention" in out
