"""How rotary frequencies are stretched: the checked fields of a published `rope_scaling`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jax_mla.config.fields import is_number


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1, and 1 for factors up to 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were stretched for long contexts; the keys of `rope_scaling`.

    `yarn` interpolates between stretched and original frequencies. `longrope` divides each
    frequency by its own `short_factor`. Beyond `original_max_position_embeddings` tokens every
    position, cached ones included, would need `long_factor` instead: unless both are equal such
    sequences are refused, and `long_factor` is kept for `save`.

    Raises:
      ValueError: a field is out of its range; the message names it.

    Source: YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753.
    """

    rope_type: Literal["yarn", "longrope"]
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("yarn", "longrope"):
            raise ValueError(
                f"rope type must be one of default, yarn, longrope, got {self.rope_type!r}"
            )
        for name in ("factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ValueError(f"rope scaling: {name} must be a number above 0, got {value!r}")
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or value < 0):
                raise ValueError(
                    f"rope scaling: {name} must be a finite number of at least 0, got {value!r}"
                )
        original = self.original_max_position_embeddings
        if type(original) is not int or original < 1:
            raise ValueError(
                "rope scaling: original_max_position_embeddings must be an integer of at least 1, "
                f"got {original!r}"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope scaling: truncate must be true or false, got {self.truncate!r}")
        if self.rope_type == "longrope":
            self._check_longrope()

    def _check_longrope(self) -> None:
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is None and name == "long_factor":
                continue
            is_tuple = isinstance(factors, tuple)
            if not is_tuple or not all(is_number(f) and f > 0 for f in factors):
                raise ValueError(
                    f"rope scaling: {name} must be a list of numbers above 0, got {factors!r}"
                )
        if self.factor > 1 and self.original_max_position_embeddings == 1:
            raise ValueError(
                f"rope scaling: longrope with factor={self.factor} needs an "
                "original_max_position_embeddings of at least 2, got 1"
            )

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by; 1.0 for every released DeepSeek model."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            original = self.original_max_position_embeddings
            return (
                math.sqrt(1 + math.log(self.factor) / math.log(original))
                if self.factor > 1
                else 1.0
            )
        if self.mscale and self.mscale_all_dim:
            of_all = yarn_mscale(self.factor, self.mscale_all_dim)
            return yarn_mscale(self.factor, self.mscale) / of_all
        return yarn_mscale(self.factor, 1.0)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that these frequencies are right for; None: any."""
        has_one_table = self.rope_type == "yarn" or self.long_factor == self.short_factor
        return None if has_one_table else self.original_max_position_embeddings
