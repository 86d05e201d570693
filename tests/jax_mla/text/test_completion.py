"""Prompts in, text out: the whole of it decoded at once, streamed or not; bad prompts refused."""

import types

import numpy as np
import pytest
import tokenizers

import jax_mla
from jax_mla.text import ByteTokenizer, JsonTokenizer, complete


@pytest.fixture
def continued(monkeypatch):
    """Has `generate` write given ids after every prompt; returns what it was called with."""

    def write(*rows):
        calls = []

        def generate(params, config, tokens, *, stream=None, **options):
            calls.append(options | {"tokens": tokens})
            width = max(map(len, rows))
            padded = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
            for column in padded.T if stream is not None else ():
                stream(column)
            lengths = np.array([len(row) for row in rows])
            return types.SimpleNamespace(tokens=padded, lengths=lengths)

        monkeypatch.setattr("jax_mla.generation.generate", generate)
        return calls

    return write


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_text_is_that_of_the_whole_minus_the_prompt(kind, files, continued):
    vocab = tokenizers.Tokenizer.from_file(str(files[kind])).get_vocab()
    new = [vocab[word] for word in ("▁wrote", "<tool>", "▁words", "llo", "</s>")]
    continued(new)
    pieces = []
    (out,) = complete(
        None, jax_mla.tiny(), JsonTokenizer(files[kind]), ["he"], max_new_tokens=5,
        stream=pieces.append,
    )  # fmt: skip
    assert out.text == " wrote wordsllo" and out.tokens == new
    assert pieces == [" wrote", " words", "llo"]


def test_prompts_are_padded_and_options_passed_on(continued):
    calls = continued([65, 257], [66])
    outs = complete(
        None, jax_mla.tiny(), ByteTokenizer(), ["é", "x"], max_new_tokens=2, temperature=0.5,
        top_k=3, top_p=0.9, min_p=0.1, key=7, eos_token_ids=(66, 257),
    )  # fmt: skip
    (call,) = calls
    np.testing.assert_array_equal(call.pop("tokens"), [[256, 0xC3, 0xA9], [256, ord("x"), 0]])
    assert call.pop("lengths").tolist() == [3, 2] and call.pop("rules") is None
    assert call == {
        "max_new_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "key": 7,
        "eos_token_ids": (66, 257),
    }  # fmt: skip
    assert [(out.prompt, out.text, out.tokens) for out in outs] == [
        ("é", "A", [65, 257]),
        ("x", "B", [66]),
    ]
    assert outs[0].prompt_tokens == [256, 0xC3, 0xA9]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("one", {}, "prompts must be a list of strings, got the string 'one'"),
        ([], {}, "at least one prompt, got none"),
        (["a\ud800"], {}, r"the prompt 'a\\ud800' is not UTF-8"),
        (["a", "b"], {"stream": print}, "streaming takes one prompt, got 2"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
    ],
)
def test_bad_prompts_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        complete(None, jax_mla.tiny(), ByteTokenizer(), prompts, **{"max_new_tokens": 1} | options)
