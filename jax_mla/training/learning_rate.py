"""Learning rates by step."""

from __future__ import annotations

import math

import jax.numpy as jnp
from optax import Schedule


def cosine(peak: float, *, num_steps: int, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Rises in a line to `peak` over the first steps, then falls in half a cosine to `final`.

    The first step has peak / warmup_steps, and the one after the last would have `final`.

    Raises:
      ValueError: the warmup is longer than the run.

    Source: Loshchilov & Hutter, arXiv 1608.03983.
    """
    _check(num_steps, warmup_steps=warmup_steps)

    def fall(progress):
        return final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * progress))

    return _schedule(peak, fall, num_steps, warmup_steps, max(num_steps - warmup_steps, 1))


def warmup_stable_decay(
    peak: float,
    *,
    num_steps: int,
    warmup_steps: int = 0,
    decay_steps: int,
    final: float = 0.0,
) -> Schedule:
    """Rises in a line to `peak`, stays there, and falls in a line to `final` at the end.

    Raises:
      ValueError: warmup and decay together are longer than the run.

    Source: Hu et al., arXiv 2404.06395; the line, Hägele et al., arXiv 2405.18392.
    """
    _check(num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)

    def fall(progress):
        return peak + (final - peak) * progress

    return _schedule(peak, fall, num_steps, warmup_steps, max(decay_steps, 1))


def _schedule(peak, fall, num_steps, warmup_steps, decay_steps) -> Schedule:
    def rate(step):
        warm = peak * (step + 1) / max(warmup_steps, 1)
        progress = jnp.clip((step - (num_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        return jnp.where(step < warmup_steps, warm, fall(progress))

    return rate


def _check(num_steps: int, **parts: int) -> None:
    for name, value in {"num_steps": num_steps, **parts}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if sum(parts.values()) > num_steps:
        named = " and ".join(f"{name}={value}" for name, value in parts.items())
        raise ValueError(f"{named} do not fit into num_steps={num_steps}")
