"""The text that tokens add to a prompt: decoded with the prompt, at once or token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jax_mla.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


def continuation_text(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `before` and `ids` together, minus the text of `before`.

    Decoding `ids` alone is not the same: SentencePiece's decoders remove the space in front of the
    first word, wherever that stands. Where `ids` change the end of the text before them (they
    complete a character, or make its bytes invalid), the changed part belongs to the result.
    """
    text = tokenizer.decode(before)
    whole = tokenizer.decode([*before, *ids])
    if whole.startswith(text):
        return whole[len(text) :]
    num_equal = sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(text, whole, strict=False)
        )
    )
    return whole[num_equal:]


class TextStream:
    """Turns tokens into text one by one; all parts joined are the `continuation_text`.

    A part is held back while later tokens could still change it: the bytes of an incomplete
    character, and tokens that are single bytes until one that is not follows.

    Args:
      prompt: ids before the first token, whose text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = list(prompt)  # the latest ids whose text is shown, one visible at least
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while it could still change."""
        self._held.append(token)
        if not self._tokenizer.is_settled(self._held):
            return ""
        text = continuation_text(self._tokenizer, self._shown, self._held)
        if text.endswith(_INCOMPLETE):
            return ""
        # Special tokens alone would decode to nothing, and the next word would be taken for the
        # first one: they are kept together with the text before them.
        self._shown = self._held if text else self._shown + self._held
        self._held = []
        return text

    def end(self) -> str:
        """The text that is still held back, with U+FFFD for an incomplete character."""
        text = continuation_text(self._tokenizer, self._shown, self._held)
        self._shown, self._held = self._shown + self._held, []
        return text
