"""The prefix cache: finds the pages that hold the first tokens of a prompt already.

A full page is known by a key over its parent's key and its own tokens, so that a key stands for all
tokens from the first one on. Free pages stay in the cache until they are reused.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Sequence

Key = bytes


def _digest(content: bytes) -> Key:
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class Match:
    """The pages that hold the first tokens of a prompt.

    Attributes:
      pages: full pages in order, and the key of each.
      partial: a page whose first `num_partial` tokens come next in the prompt, but not its other
        ones: to be copied.
    """

    pages: list[int]
    keys: list[Key]
    partial: int | None = None
    num_partial: int = 0


@dataclasses.dataclass(frozen=True)
class _Entry:
    key: Key
    parent: Key
    tokens: tuple[int, ...]


class PrefixCache:
    """Full pages by the tokens that they and all pages before them hold.

    Args:
      digest: 16 bytes of a content; tests pass weak ones. Keys only find a page: its own tokens
        are compared too.
    """

    def __init__(self, page_size: int, digest: Callable[[bytes], Key] = _digest):
        self.page_size, self._digest = page_size, digest
        self._by_key: dict[Key, int] = {}
        self._entries: dict[int, _Entry] = {}
        # Insertion-ordered sets, so that equal runs choose equal pages.
        self._children: dict[Key, dict[int, None]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._entries

    def pages(self) -> Collection[int]:
        """All that can be found."""
        return self._entries.keys()

    def root(self, **salt: str) -> Key:
        """The parent of first pages. Equal tokens under another salt are other pages.

        Args:
          salt: whatever else decides what the pages hold or who may share them, each under a name
            of its own, so that an adapter called like a user's salt is not taken for it.
        """
        return self._digest(json.dumps(salt, sort_keys=True).encode())

    def register(self, page: int, parent: Key, tokens: Sequence[int]) -> Key:
        """Makes a full page findable, unless another one holds the same; its key."""
        key = self._key(parent, tokens)
        if key not in self._by_key:
            self._by_key[key] = page
            self._entries[page] = _Entry(key, parent, tuple(tokens))
            self._children.setdefault(parent, {})[page] = None
        return key

    def forget(self, page: int) -> None:
        """What the page held is lost. A page that is not in the cache changes nothing."""
        if (entry := self._entries.pop(page, None)) is None:
            return
        del self._by_key[entry.key]
        siblings = self._children[entry.parent]
        del siblings[page]
        if not siblings:
            del self._children[entry.parent]

    def match(self, tokens: Sequence[int], root: Key) -> Match:
        """The longest match that leaves at least the last token to compute."""
        pages, keys, size = [], [], self.page_size
        parent = root
        for begin in range(0, len(tokens) - size, size):
            run = tuple(tokens[begin : begin + size])
            key = self._key(parent, run)
            page = self._by_key.get(key)
            if page is None or self._entries[page].parent != parent:
                break
            if self._entries[page].tokens != run:
                break
            pages.append(page)
            keys.append(key)
            parent = key
        begin = len(pages) * size
        rest = tuple(tokens[begin : min(begin + size, len(tokens) - 1)])
        best, most = None, 0
        for page in self._children.get(parent, ()):
            count = _num_equal(self._entries[page].tokens, rest)
            if count > most:
                best, most = page, count
        return Match(pages, keys, best, most)

    def check(self) -> None:
        """Every page is found by the key of what it holds.

        Raises:
          RuntimeError: one is not.
        """
        for page, entry in self._entries.items():
            is_found = self._by_key.get(entry.key) == page and len(entry.tokens) == self.page_size
            if not is_found or self._key(entry.parent, entry.tokens) != entry.key:
                raise RuntimeError(f"page {page} is not found by the key of its tokens")
            if page not in self._children.get(entry.parent, ()):
                raise RuntimeError(f"page {page} is no child of its parent")
        if len(self._by_key) != len(self._entries):
            raise RuntimeError(f"{len(self._by_key)} keys for {len(self._entries)} pages")

    def _key(self, parent: Key, tokens: Sequence[int]) -> Key:
        return self._digest(parent + array.array("i", tokens).tobytes())


def _num_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
