"""Text to token ids and back: a folder's tokenizer.json, or plain bytes for the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax_mla.checkpoint.folder import read_json
from jax_mla.config.model import DeepSeekConfig

# The byte-level vocabulary: ids 0..255 are the bytes themselves.
BYTE_BOS, BYTE_EOS, BYTE_PAD = 256, 257, 258


class ByteTokenizer:
    """Every byte of the UTF-8 text is its own id, after one BYTE_BOS."""

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the leading token that the model expects."""
        return [BYTE_BOS, *text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; what is not UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A published tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, file: Path, bos_token_id: int | None):
        try:
            from tokenizers import Tokenizer as Backend
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{file} needs the tokenizers package: pip install 'jax-mla[hf]'"
            ) from None
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{file} is not a tokenizer: {error}") from None
        self._bos = bos_token_id

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the leading token that the model expects."""
        ids = self._backend.encode(text).ids
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; what is not UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


Tokenizer = ByteTokenizer | JsonTokenizer


class TextStream:
    """Turns tokens into text one by one, holding back bytes that do not make a character yet."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the last ids that were shown: context, for joining spaces
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._held.append(token)
        text = self._text_of_held()
        if text.endswith("\ufffd"):
            return ""
        self._shown, self._held = self._held, []
        return text

    def end(self) -> str:
        """What is still held back, with U+FFFD for an incomplete character."""
        text = self._text_of_held()
        self._held = []
        return text

    def _text_of_held(self) -> str:
        context = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(context) :]


def load_tokenizer(folder: Path, config: DeepSeekConfig) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    A tokenizer.json is used when there is one, with the beginning-of-text token when
    tokenizer_config.json asks for it. Without one, a model whose special ids are those of the
    byte-level vocabulary (bos 256, eos 257) reads bytes.

    Raises:
      ValueError: the folder has no tokenizer.json and the model is not byte-level, or a file is
        malformed.
      ModuleNotFoundError: tokenizer.json needs the `tokenizers` package.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return JsonTokenizer(file, config.bos_token_id if _adds_bos(folder) else None)
    if config.bos_token_id == BYTE_BOS and BYTE_EOS in config.eos_token_id:
        return ByteTokenizer()
    raise ValueError(
        f"{folder} has no tokenizer.json, and bos_token_id={config.bos_token_id}, "
        f"eos_token_id={config.eos_token_id} are not the byte-level {BYTE_BOS} and {BYTE_EOS}"
    )


def _adds_bos(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file).get("add_bos_token"))
