"""Learning rates by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

LearningRate = optax.Schedule  # of a step, counted from 0


def cosine(
    peak: float, *, num_steps: int, warmup_steps: int = 0, final: float = 0.0
) -> LearningRate:
    """Linear warmup to `peak`, then cosine decay to `final`.

    The first step has peak / warmup_steps; the step after the last would have `final`.

    Raises:
      ValueError: the warmup is longer than the run.

    Source: Loshchilov & Hutter, arXiv 1608.03983.
    """
    check_lengths(num_steps, warmup_steps=warmup_steps)

    def decayed(progress):
        return final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * progress))

    return _by_step(peak, decayed, num_steps, warmup_steps, max(num_steps - warmup_steps, 1))


def warmup_stable_decay(
    peak: float,
    *,
    num_steps: int,
    warmup_steps: int = 0,
    decay_steps: int,
    final: float = 0.0,
) -> LearningRate:
    """Linear warmup to `peak`, constant, linear decay to `final` (WSD).

    Raises:
      ValueError: warmup and decay together are longer than the run.

    Source: Hu et al., arXiv 2404.06395; linear decay, Hägele et al., arXiv 2405.18392.
    """
    check_lengths(num_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)

    def decayed(progress):
        return peak + (final - peak) * progress

    return _by_step(peak, decayed, num_steps, warmup_steps, max(decay_steps, 1))


def _by_step(
    peak: float,
    decayed: Callable[[Any], Any],
    num_steps: int,
    warmup_steps: int,
    decay_steps: int,
) -> LearningRate:
    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warm = peak * (step + 1) / max(warmup_steps, 1)
        progress = jnp.clip((step - (num_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        return jnp.where(step < warmup_steps, warm, decayed(progress))

    return rate


def check_lengths(num_steps: int, **parts: int) -> None:
    """The parts of a run, such as its warmup, are no longer than the run."""
    for name, value in {"num_steps": num_steps, **parts}.items():
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if sum(parts.values()) > num_steps:
        named = " and ".join(f"{name}={value}" for name, value in parts.items())
        raise ValueError(f"{named} do not fit into num_steps={num_steps}")
