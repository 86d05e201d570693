"""The bar for loading and saving: on terminals, and only for work that takes long."""

import pytest

from jax_mla.cli import byte_progress


class Terminal:
    def __init__(self, is_terminal):
        self.isatty = lambda: is_terminal
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_progress_is_shown_on_terminals_after_two_seconds(monkeypatch, is_terminal, seconds):
    stderr = Terminal(is_terminal)
    now = [100.0]
    monkeypatch.setattr(byte_progress.sys, "stderr", stderr)
    monkeypatch.setattr(byte_progress.time, "monotonic", lambda: now[0])
    with byte_progress.ByteProgress("Loading") as bar:
        bar(1_000_000, 4_000_000)
        now[0] += seconds
        bar(2_000_000, 4_000_000)
        bar(4_000_000, 4_000_000)
    assert bool(stderr.text) == (is_terminal and seconds > 2)
    if stderr.text:
        assert "Loading" in stderr.text
        assert "4.0/4.0 MB" in stderr.text
