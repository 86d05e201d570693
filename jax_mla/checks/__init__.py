"""Checks of what callers pass in that belong to no other part: sizes, arrays, tokens."""
