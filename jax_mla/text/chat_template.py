"""Chat templates: messages to the text of a prompt, by jinja2 in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_mla.checkpoint.files import read_json

# For models without a template that read bytes, as the bundled one does: they continue text and
# were never taught turns, so the messages are paragraphs and the answer continues the last one.
PLAIN_TEMPLATE = "{{ messages | map(attribute='content') | join('\n\n') }}"


class ChatTemplate:
    """A jinja2 template as folders of models carry it, which can neither change nor reach anything.

    Args:
      source: the template.
      special_tokens: by name, such as bos_token, for the template to write.
      name: of the template in errors.

    Raises:
      ModuleNotFoundError: the jinja2 package is missing.
      ValueError: the template does not parse; the message names it and the line.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        name: str = "the chat template",
    ) -> None:
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{name} needs the jinja2 package: pip install 'jax-mla[hf]'"
            ) from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        self._special, self._name = dict(special_tokens or {}), name
        self._errors = (jinja2.TemplateError, TypeError, ArithmeticError, AttributeError)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name} does not parse, line {error.lineno}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt that asks for the answer to messages, each with a role and a content.

        Args:
          variables: others that the template reads.

        Raises:
          ValueError: the template refuses the messages, or fails on them.
        """
        known = self._special | {"add_generation_prompt": True} | variables
        try:
            return self._template.render(known | {"messages": list(messages)})
        except (*self._errors, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"{self._name} refuses the messages: {error}") from None


def load_chat_template(folder: str | Path, *, is_byte_level: bool = False) -> ChatTemplate | None:
    """The template of a checkpoint folder: chat_template.jinja, or that of tokenizer_config.json.

    Args:
      is_byte_level: without a template, messages are joined by blank lines, and the model
        continues the last one.

    Returns:
      None where there is no template.

    Raises:
      ModuleNotFoundError: the jinja2 package is missing.
      ValueError: the template does not parse, or tokenizer_config.json has none by the name of
        "default" among several.
    """
    file, settings_file = (
        Path(folder) / "chat_template.jinja",
        Path(folder) / "tokenizer_config.json",
    )
    settings = read_json(settings_file) if settings_file.is_file() else {}
    special = {
        name: text
        for name, value in settings.items()
        if name.endswith("_token") and (text := _token_text(value)) is not None
    }
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special, name=str(file))
    source = settings.get("chat_template")
    if isinstance(source, list):  # several with names
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        if "default" not in named:
            names = ", ".join(map(str, named)) or "none"
            raise ValueError(
                f"chat_template of {settings_file} must have one named default, got {names}"
            )
        source = named["default"]
    if source is not None:
        if not isinstance(source, str):
            kind = type(source).__name__
            raise ValueError(f"chat_template of {settings_file} must be a text, got {kind}")
        return ChatTemplate(source, special, name=f"chat_template of {settings_file}")
    return ChatTemplate(PLAIN_TEMPLATE, name="the plain template") if is_byte_level else None


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _refuse(message: str) -> None:
    raise ValueError(message)
