"""Weights for tests. `jax_mla.init` is compiled for every config, which takes most tests' time."""

import jax.numpy as jnp
import numpy as np

from jax_mla import DeepSeekConfig
from jax_mla.config.leaves import leaves_of


def random_params(config: DeepSeekConfig, seed: int = 0) -> dict:
    """Parameters that are distributed as those of `jax_mla.init`, but other ones."""
    rng, params = np.random.default_rng(seed), {}
    for leaf in leaves_of(config):
        *parents, name = leaf.path
        if leaf.type.kind in ("matrix", "table"):
            value = config.initializer_range * rng.standard_normal(leaf.shape)
        else:
            is_norm = leaf.type.kind == "vector" and name == "weight"
            value = np.full(leaf.shape, 1.0 if is_norm else 0.0)
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        # Rounded by numpy: JAX would compile a conversion for every shape.
        dtype = jnp.dtype(leaf.type.stored_dtype(config.dtype))
        place[name] = jnp.asarray(value.astype(dtype))
    return params
