"""Serving: many requests at once over one paged latent cache, each with the tokens of its own.

request.py     a request and its options                    plain Python, as the next four
pages.py       which pages are free, reference counts
prefix.py      which pages hold the beginning of a prompt
scheduler.py   who runs in the next step
invariants.py  what holds between two steps
batch.py       a step as numpy arrays
programs.py    what the device computes
runner.py      the pool, the compiled programs, and running steps on them
pool_size.py   how many pages fit into memory
engine.py      submit, step, generate
events.py      what a step did, where the engine stands
progress.py    the bar of the warm-up
front.py       the engine behind asyncio
stop.py        stop strings, for whoever makes tokens text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Imported on first use, so that the scheduler needs no jax.
_HOME = {
    "AsyncEngine": "front",
    "Engine": "engine",
    "Event": "events",
    "Request": "request",
    "RequestOptions": "request",
    "Stats": "events",
    "StopStrings": "stop",
    "TokenLogprobs": "request",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jax_mla.serving.engine import Engine
    from jax_mla.serving.events import Event, Stats
    from jax_mla.serving.front import AsyncEngine
    from jax_mla.serving.request import Request, RequestOptions, TokenLogprobs
    from jax_mla.serving.stop import StopStrings


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'jax_mla.serving' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_mla.serving.{_HOME[name]}"), name)
