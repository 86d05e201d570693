"""Text to token ids and back: a folder's tokenizer.json, or plain bytes for the bundled model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jax_mla.checkpoint.files import read_json
from jax_mla.config.model import DeepSeekConfig

# The byte-level vocabulary: ids 0..255 are the bytes themselves.
BYTE_BOS, BYTE_EOS, BYTE_PAD = 256, 257, 258
# SentencePiece's name for the token of one byte, which its decoders turn into that byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PLACE = "{prompt}"


@runtime_checkable
class Tokenizer(Protocol):
    """What `complete` and `TextStream` need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the leading token that the model expects; never truncated."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    def is_settled(self, ids: Sequence[int]) -> bool:
        """Whether more ids can only add to the text of these, except to a U+FFFD at its end."""
        ...


class ByteTokenizer:
    """Every byte of the UTF-8 text is its own id, after one BYTE_BOS."""

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt: BYTE_BOS, then its bytes."""
        return [BYTE_BOS, *text.encode("utf-8")]

    def encode_chat(self, text: str) -> list[int]:
        """The ids of what a chat template has written: BYTE_BOS, then its bytes."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def is_settled(self, ids: Sequence[int]) -> bool:
        """Always: a character is incomplete only at the end, where it is U+FFFD."""
        return True


class JsonTokenizer:
    """A published tokenizer.json, read by the `tokenizers` package.

    The `truncation` and `padding` that such files may carry, from the training of the tokenizer or
    of another model, are switched off: every id of a text is returned, and no other.

    Args:
      path: of the file.
      template: text that every prompt is put into, with one "{prompt}" for its place; None encodes
        the prompt alone.
      bos_token_id: put in front unless the file's own rules already do; None adds nothing.

    Raises:
      ModuleNotFoundError: the `tokenizers` package is missing.
      ValueError: the file is missing or not a tokenizer, or the template has no "{prompt}" or
        several.
    """

    def __init__(
        self, path: str | Path, template: str | None = None, *, bos_token_id: int | None = None
    ) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{path} needs the tokenizers package: pip install 'jax-mla[hf]'"
            ) from None
        if template is not None and str(template).count(_PLACE) != 1:
            raise ValueError(f"template must have one {_PLACE}, got {template!r}")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._template, self._bos = template, bos_token_id

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the leading token that the model expects; never truncated."""
        if self._template is not None:
            text = self._template.replace(_PLACE, text)
        ids = self._backend.encode(text).ids
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def encode_chat(self, text: str) -> list[int]:
        """The ids of what a chat template has written, which names its special tokens itself."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def is_settled(self, ids: Sequence[int]) -> bool:
        """Whether the last token that has a text is more than a byte.

        One invalid byte turns all bytes next to it into U+FFFD, valid characters included.
        """
        for token_id in reversed(ids):
            token = None if token_id in self._special else self._backend.id_to_token(token_id)
            if token is not None:
                return _BYTE_TOKEN.fullmatch(token) is None
        return True


def load_tokenizer(folder: str | Path, config: DeepSeekConfig) -> ByteTokenizer | JsonTokenizer:
    """The tokenizer of a checkpoint folder.

    A tokenizer.json is used when there is one, with the beginning-of-text token when
    tokenizer_config.json asks for it. Without one, a model whose special ids are those of the
    byte-level vocabulary (bos 256, eos 257) reads bytes.

    Raises:
      ValueError: the folder has no tokenizer.json and the model is not byte-level, or a file is
        malformed.
      ModuleNotFoundError: tokenizer.json needs the `tokenizers` package.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        return JsonTokenizer(file, bos_token_id=config.bos_token_id if _adds_bos(folder) else None)
    if config.bos_token_id == BYTE_BOS and BYTE_EOS in config.eos_token_id:
        return ByteTokenizer()
    raise ValueError(
        f"{folder} has no tokenizer.json, and bos_token_id={config.bos_token_id}, "
        f"eos_token_id={config.eos_token_id} are not the byte-level {BYTE_BOS} and {BYTE_EOS}"
    )


def _adds_bos(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("add_bos_token"))
