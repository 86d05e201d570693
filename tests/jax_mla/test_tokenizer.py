"""Text to ids and back; streamed text equals text decoded at once."""

import json
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import jax_mla
from jax_mla.text.tokenizer import ByteTokenizer, JsonTokenizer, TextStream, load_tokenizer

LINE = "Über 北京 and 🙂🙃 we fly. e\u0301"


@pytest.fixture
def published(tmp_path):
    """A folder with a byte-level BPE tokenizer of 300 entries, as published models have."""
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(
        [LINE * 3], vocab_size=300, special_tokens=["<s>"], show_progress=False
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def streamed(tokenizer, ids) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.feed(token) for token in ids), stream.end()]


@given(st.text())
def test_bytes_round_trip(text):
    text = text.encode("utf-8", "replace").decode()
    ids = ByteTokenizer().encode(text)
    assert ids[0] == 256
    assert ByteTokenizer().decode(ids) == text


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


def test_stream_of_a_published_tokenizer(published):
    tokenizer = load_tokenizer(published, jax_mla.v2_lite())
    assert isinstance(tokenizer, JsonTokenizer)
    text = f"we fly 喜 {LINE}"  # a character that was not in the training text
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces[:-1], "the new character takes several tokens"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_as_the_folder_says(adds_bos, published):
    (published / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds_bos}))
    ids = load_tokenizer(published, jax_mla.v2_lite()).encode("fly")
    assert (ids[0] == jax_mla.v2_lite().bos_token_id) == adds_bos


def test_bundled_model_reads_bytes(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, jax_mla.tiny()), ByteTokenizer)


def test_without_a_tokenizer_the_special_ids_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json, and bos_token_id=100000"):
        load_tokenizer(tmp_path, jax_mla.v2_lite())


def test_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path, jax_mla.v2_lite())


@pytest.mark.parametrize("content", ["[]", "{"])
def test_damaged_tokenizer_config_is_refused_by_name(content, published):
    (published / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not"):
        load_tokenizer(published, jax_mla.v2_lite())


def test_missing_package_is_one_sentence(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax-mla\[hf\]'"):
        load_tokenizer(published, jax_mla.v2_lite())
