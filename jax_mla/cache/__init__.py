"""Latent caches, dense and paged, and what a generation loop of one's own does to their lengths.

latent.py   the data and the constructors
pages.py    capacity, appending rows, advancing and truncating lengths
shards.py   a cache on a mesh: its sharding, and one device's view of it
check.py    whether a cache fits a model, a batch and a mesh
"""

from jax_mla.cache.latent import Cache, LatentCache, PagedLatentCache
from jax_mla.cache.pages import advance, append, capacity, truncate

__all__ = [
    "Cache",
    "LatentCache",
    "PagedLatentCache",
    "advance",
    "append",
    "capacity",
    "truncate",
]
