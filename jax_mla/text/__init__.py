"""Text in and out: tokenizers, prompts to continuations, and text while it is generated."""

from jax_mla.text.chat_template import ChatTemplate, load_chat_template
from jax_mla.text.completion import Completion, complete
from jax_mla.text.stream import TextStream, continuation_text
from jax_mla.text.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "Completion",
    "JsonTokenizer",
    "TextStream",
    "Tokenizer",
    "complete",
    "continuation_text",
    "load_chat_template",
    "load_tokenizer",
]
