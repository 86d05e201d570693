"""Stop strings: what is shown, in whatever pieces the text arrives."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla.serving.stop import StopStrings
from jax_mla.text import ByteTokenizer, TextStream


def shown(stops, pieces):
    stop = StopStrings(stops)
    parts = [stop.feed(piece) for piece in pieces]
    return [*parts, stop.end()], stop.found


@pytest.mark.parametrize(
    ("stops", "pieces", "parts", "found"),
    [
        (["END"], ["one E", "N", "D two"], ["one ", "", "", ""], "END"),
        (["END"], ["one E", "NE", "ND"], ["one ", "EN", "", ""], "END"),
        (["END"], ["one E", "N"], ["one ", "", "EN"], None),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], "aab"),
        (["abab"], ["ab", "ac"], ["", "abac", ""], None),
        (["b", "abc"], ["a", "bc"], ["", "a", ""], "b"),
        (["c", "abc"], ["a", "bc"], ["", "", ""], "abc"),
        (["€"], ["5 ", "€ 6"], ["5 ", "", ""], "€"),
        ([], ["a", "b"], ["a", "b", ""], None),
        (["x"], ["x", "more"], ["", "", ""], "x"),
    ],
)
def test_pieces(stops, pieces, parts, found):
    assert shown(stops, pieces) == (parts, found)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    borders=st.lists(st.integers(0, 30), max_size=6),
)
def test_what_is_shown_does_not_depend_on_the_pieces(text, stops, borders):
    borders = sorted({0, len(text), *(min(border, len(text)) for border in borders)})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    parts, found = shown(stops, pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(parts) == (text[: min(ends)[1]] if ends else text)
    assert (found is None) == (not ends)
    # At no time was anything shown that would have been taken back.
    assert all(text.startswith("".join(parts[:i])) for i in range(len(parts)))


@pytest.mark.parametrize("stop", ["€", "😀", "ab€", "€ 😀"])
def test_characters_of_several_tokens(stop):
    """The bundled model's tokens are bytes: a character ends in the middle of a token's text."""
    tokenizer = ByteTokenizer()
    text = f"costs 5 ab{stop} and more"
    stream, stops, out = TextStream(tokenizer, tokenizer.encode("It ")), StopStrings([stop]), ""
    for token in text.encode():
        out += stops.feed(stream.feed(token))
        if stops.found:
            break
    assert out == text[: text.index(stop)] and stops.found == stop


def test_refused():
    with pytest.raises(ValueError, match=r"must not be empty, got \['a', ''\]"):
        StopStrings(["a", ""])
    with pytest.raises(ValueError, match="must be a list of strings, got the string 'ab'"):
        StopStrings("ab")
