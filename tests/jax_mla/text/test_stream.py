"""Streamed text equals text decoded at once, which is the decoding of prompt and continuation."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jax_mla.text import ByteTokenizer, JsonTokenizer, TextStream, continuation_text

REPLACEMENT = "\ufffd"


def streamed(tokenizer, ids, prompt=()) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.feed(token) for token in ids), stream.end()]


@pytest.fixture
def opened(files):
    """A tokenizer of some kind, and a function from the words of its vocabulary to their ids."""

    def open_kind(kind):
        vocab = tokenizers.Tokenizer.from_file(str(files[kind])).get_vocab()
        return JsonTokenizer(files[kind]), lambda *words: [vocab[word] for word in words]

    return open_kind


@given(st.text())
def test_stream_of_bytes_is_the_text_and_never_shows_half_a_character(text):
    text = text.encode("utf-8", "replace").decode()
    pieces = streamed(ByteTokenizer(), ByteTokenizer().encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 319)))
def test_stream_of_any_ids_equals_decoding_at_once(ids):
    assert "".join(streamed(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


def test_stream_shows_a_character_when_its_last_byte_arrives():
    assert streamed(ByteTokenizer(), list("a🙂b".encode())) == ["a", "", "", "", "🙂", "b", ""]


def test_stream_ends_with_what_is_incomplete():
    assert streamed(ByteTokenizer(), list("🙂".encode())[:3]) == ["", "", "", "\ufffd"]


def test_stream_of_characters_of_several_tokens(files):
    tokenizer = JsonTokenizer(files["byte_level"])
    text = "Über 北京 and 🙂🙃 we fly 喜. e\u0301"
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces[:-1], "a character takes several tokens"


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_the_space_after_the_prompt_is_kept(kind, opened):
    tokenizer, ids_of = opened(kind)
    prompt, new = ids_of("▁he"), ids_of("▁wrote", "▁words")
    assert continuation_text(tokenizer, prompt, new) == " wrote words"
    assert continuation_text(tokenizer, [], new) == "wrote words"
    assert streamed(tokenizer, new, prompt) == [" wrote", " words", ""]
    assert streamed(tokenizer, new) == ["wrote", " words", ""]


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
@pytest.mark.parametrize("special", [["<tool>"], ["<tool>", "</s>"]], ids=["one", "two"])
def test_the_space_after_a_special_token_is_kept(kind, special, opened):
    tokenizer, ids_of = opened(kind)
    new = ids_of("▁wrote", *special, "▁words")
    assert streamed(tokenizer, new) == ["wrote", *[""] * len(special), " words", ""]
    in_front = ids_of("<s>", "▁he", *special)
    assert streamed(tokenizer, new, in_front)[0] == " wrote"


def test_no_space_is_made_up_after_a_prompt_that_has_no_text(opened):
    tokenizer, ids_of = opened("sentencepiece")
    new = ids_of("<tool>", "▁wrote")
    assert streamed(tokenizer, new, ids_of("<s>")) == ["", "wrote", ""]


def test_bytes_wait_for_the_token_that_ends_them(opened):
    """One invalid byte would turn the valid ones before it into U+FFFD."""
    tokenizer, ids_of = opened("sentencepiece")
    euro = ids_of("<0xE2>", "<0x82>", "<0xAC>")
    word = ids_of("▁words")
    assert streamed(tokenizer, [*euro, *word, *euro]) == ["", "", "", "€ words", "", "", "", "€"]
    invalid = [*euro, *ids_of("<0xFF>")]
    assert streamed(tokenizer, [*invalid, *word])[4] == REPLACEMENT * 4 + " words"


def test_a_character_may_begin_in_the_prompt(opened):
    tokenizer, ids_of = opened("byte_level")
    prompt, new = ids_of("w", "Ã"), ids_of("©", "w")
    assert streamed(tokenizer, new, prompt) == ["é", "w", ""]
    assert continuation_text(tokenizer, prompt, new) == "éw"


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "byte_level", "word_piece"])
@given(st.data())
def test_streams_of_any_ids_are_the_decoding_of_the_whole(kind, files, data):
    tokenizer = JsonTokenizer(files[kind])
    size = (
        len(tokenizers.Tokenizer.from_file(str(files[kind])).get_vocab()) + 2
    )  # a model's vocabulary may be larger
    few = st.integers(0, min(size - 1, 18))  # words and special tokens rather than bytes
    prompt, new = (
        data.draw(st.lists(st.one_of(few, st.integers(0, size - 1)), max_size=n)) for n in (4, 12)
    )
    text = "".join(streamed(tokenizer, new, prompt))
    assert text == continuation_text(tokenizer, prompt, new)
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    assert whole.endswith(text)
    if whole.startswith(before):
        assert before + text == whole
