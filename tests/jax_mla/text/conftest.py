"""Small tokenizers of the kinds that published models have."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<s>", "</s>", "<tool>")
WORDS = ("▁", "▁he", "▁wrote", "▁words", "llo", "é", "�", "\u2581\u2581", "ß", "\n")


def sentencepiece(scheme="first", *, has_bytes=True):
    """Words with their space in front, which the decoder removes from the first; unknown
    characters as bytes, as Llama's tokenizer."""
    vocab = {"<unk>": 0, **{word: i for i, word in enumerate((*SPECIAL, *WORDS), start=1)}}
    if has_bytes:
        vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=[], byte_fallback=has_bytes, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return backend


def metaspace():
    """Words with their space in front, by the decoder of that name, without bytes."""
    backend = sentencepiece(has_bytes=False)
    backend.decoder = decoders.Metaspace()
    return backend


def byte_level():
    """Tokens of one to three bytes, as GPT-2's and DeepSeek's tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("ð", "Ł"), ("ðŁ", "Ļ"), ("Ã", "©")]
    words = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return backend


def word_piece():
    """Words without their space, and continuations of words marked by ##, as BERT's tokenizer."""
    words = ["[UNK]", *SPECIAL, "he", "wrote", "##llo", "words", ".", "n", "'", "t", "##s"]
    backend = Tokenizer(
        models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return backend


BACKENDS = {
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "byte_level": byte_level,
    "word_piece": word_piece,
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The tokenizer.json of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, make in BACKENDS.items():
        make().save(str(folder / f"{kind}.json"))
    return {kind: folder / f"{kind}.json" for kind in BACKENDS}
