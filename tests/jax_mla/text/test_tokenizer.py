"""Text to ids and back: what a folder says, and nothing truncated or padded."""

import json
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

import jax_mla
from jax_mla.text import ByteTokenizer, JsonTokenizer, load_tokenizer

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


@given(st.text())
def test_bytes_round_trip(text):
    text = text.encode("utf-8", "replace").decode()
    ids = ByteTokenizer().encode(text)
    assert ids[0] == 256
    assert ByteTokenizer().decode(ids) == text


def test_published_tokenizer_round_trips(published):
    tokenizer = load_tokenizer(published, jax_mla.v2_lite())
    assert isinstance(tokenizer, JsonTokenizer)
    text = f"we fly 喜 {LINE}"  # a character that was not in the training text
    assert tokenizer.decode(tokenizer.encode(text)) == text


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


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_stored_truncation_and_padding_are_not_obeyed(kind, direction, files, tmp_path):
    """A file saved after training another model: 4 tokens at most, or 64 at least."""
    wanted = JsonTokenizer(files[kind]).encode("wrote words " * 20)
    assert len(wanted) > 64
    backend = tokenizers.Tokenizer.from_file(str(files[kind]))
    backend.enable_truncation(4, direction=direction)
    backend.enable_padding(length=64, pad_id=1, direction=direction)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, jax_mla.v2_lite())
    assert tokenizer.encode("wrote words " * 20) == wanted
    short = tokenizer.encode("wrote")
    assert short == JsonTokenizer(files[kind]).encode("wrote") and len(short) < 64


def test_path_may_be_text(files):
    path = files["byte_level"]
    assert JsonTokenizer(str(path)).encode("a") == JsonTokenizer(path, None).encode("a")
    assert isinstance(load_tokenizer(str(path.parent), jax_mla.tiny()), ByteTokenizer)


def test_template_surrounds_every_prompt(files):
    tokenizer = JsonTokenizer(files["byte_level"], "<s>user: {prompt}</s>")
    plain = JsonTokenizer(files["byte_level"])
    assert tokenizer.encode("{a} b") == [0, *plain.encode("user: {a} b"), 1]


@pytest.mark.parametrize("template", ["", "no place", "{prompt}{prompt}", 7])
def test_a_template_has_one_place_for_the_prompt(template, files):
    with pytest.raises(ValueError, match=r"template must have one {prompt}, got "):
        JsonTokenizer(files["byte_level"], template)
