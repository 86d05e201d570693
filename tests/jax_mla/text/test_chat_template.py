"""Chat templates: where they come from, what they may do, and what is refused."""

import json

import pytest

from jax_mla.text import ByteTokenizer, ChatTemplate, load_chat_template

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TURNS = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RENDERED = "<bos><system>Be brief.<user>Hello<assistant>"


def test_a_folder_has_its_template_in_a_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<bos>"}}))
    assert load_chat_template(tmp_path).render(MESSAGES) == RENDERED


@pytest.mark.parametrize(
    "source",
    [TURNS, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TURNS}]],
)
def test_or_in_the_tokenizers_settings(source, tmp_path):
    settings = {"bos_token": "<bos>", "chat_template": source}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_chat_template(tmp_path).render(MESSAGES) == RENDERED


def test_models_of_bytes_continue_the_paragraphs(tmp_path):
    assert load_chat_template(tmp_path) is None
    text = load_chat_template(tmp_path, is_byte_level=True).render(MESSAGES)
    assert text == "Be brief.\n\nHello"
    assert ByteTokenizer().encode_chat(text) == ByteTokenizer().encode(text)


def test_variables_reach_the_template():
    template = ChatTemplate("{{ thinking }} {{ {'a': '<é>'} | tojson }}")
    assert template.render([], thinking=True) == 'True {"a": "<é>"}'


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{{ missing.field }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_what_a_template_may_not_do_is_a_sentence(source):
    with pytest.raises(ValueError, match="the chat template refuses the messages: "):
        ChatTemplate(source).render(MESSAGES)


def test_what_does_not_parse_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("one\n{% if %}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja does not parse, line 2"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{"name": "rag", "template": "x"}], "named default, got rag"),
        (3, "must be a text, got int"),
    ],
)
def test_settings_without_a_usable_template_are_refused(source, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(ValueError, match=message):
        load_chat_template(tmp_path)
