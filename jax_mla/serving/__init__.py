"""Serving: many requests at once over one paged latent cache, each with the tokens of its own.

request.py     a request and its options                    plain Python, as the next four
pages.py       which pages are free, reference counts
prefix.py      which pages hold the beginning of a prompt
scheduler.py   who runs in the next step
invariants.py  what holds between two steps
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Imported on first use, so that the scheduler needs no jax.
_HOME = {"Request": "request", "RequestOptions": "request"}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jax_mla.serving.request import Request, RequestOptions


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'jax_mla.serving' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_mla.serving.{_HOME[name]}"), name)
