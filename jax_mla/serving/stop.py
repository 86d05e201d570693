"""Stop strings: ends a text where one of them begins, without ever showing a part of it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text in pieces of any length, as far as no stop string can begin in it.

    Args:
      stops: none of them empty; none at all lets everything through.

    Attributes:
      found: the stop string that ended the text, or None. Of several the one that ends first, and
        of these the longest, so that it does not depend on the pieces.

    Raises:
      ValueError: a stop string is empty, or `stops` is one string.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str):
            raise ValueError(f"stops must be a list of strings, got the string {stops!r}")
        if "" in stops:
            raise ValueError(f"stop strings must not be empty, got {list(stops)!r}")
        self._stops = list(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is certain to come before any stop string; nothing after one is found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [
            (begin + len(stop), begin, stop)
            for stop in self._stops
            if (begin := text.find(stop)) >= 0
        ]
        if ends:
            _, begin, self.found = min(ends)
            self._held = ""
            return text[:begin]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        end = len(text) - held
        self._held = text[end:]
        return text[:end]

    def end(self) -> str:
        """What was held back, once the text has ended by itself."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
