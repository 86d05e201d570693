"""A progress bar for loading and saving weights."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_PATIENCE_S = 2.0


class ByteProgress:
    """A bar on stderr; shown on a terminal only, and only once the work has taken two seconds.

    Pass it to `load` or `save`: with ByteProgress("Loading") as bar: load(folder, progress=bar).
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done_bytes)
        elif sys.stderr.isatty() and time.monotonic() - self._started > _PATIENCE_S:
            self._bar = self._open(done_bytes, total_bytes)

    def _open(self, done_bytes: int, total_bytes: int) -> Progress:
        from rich import progress
        from rich.console import Console

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        bar.start()
        bar.add_task(self._label, total=total_bytes, completed=done_bytes)
        return bar
