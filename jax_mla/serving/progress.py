"""The progress bar of the warm-up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def warming_up(show: bool, capacity: str) -> Iterator[Callable[[int, int], None]]:
    """Draws how many programs of how many are compiled, and for how long, on standard error."""
    if not show:
        yield lambda done, total: None
        return
    console = Console(stderr=True)
    console.print(capacity, highlight=False)
    columns = TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
