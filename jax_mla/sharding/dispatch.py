"""How tokens reach the devices of their experts. No jax."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from jax_mla.checks.sizes import check_one_of

Method = Literal["dense", "a2a", "ragged"]


@dataclasses.dataclass(frozen=True)
class ExpertDispatch:
    """How tokens reach the devices of their experts, where `ShardingRules.expert` shards these.

    Attributes:
      method: "dense" gathers all tokens on every device of the experts and sums the results;
        "a2a" sends every token to the devices of its experts, in blocks of equal size; "ragged"
        sends only the rows that there are, which XLA cannot do on CPUs.
      capacity: of "a2a", the rows that one device may send to another, in units of the mean
        M * A / devices of its M tokens, padding not counted. The first rows fit, in the order of
        the tokens, and the others are dropped; `forward_trace` and `train_step` report how many.
        None drops nothing. Padding changes what is dropped only where it moves a token to another
        device, by adding rows or, under `ShardingRules.sequence`, positions.

    Raises:
      ValueError: there is no such method, or capacity is not above 0 or set for another method.
    """

    method: Method = "dense"
    capacity: float | int | None = None

    def __post_init__(self) -> None:
        check_one_of("method", self.method, get_args(Method))
        if (capacity := self.capacity) is None:
            return
        is_number = isinstance(capacity, float | int) and not isinstance(capacity, bool)
        if not is_number or not 0 < capacity < math.inf:
            raise ValueError(f"capacity must be a number above 0, got {capacity!r}")
        if self.method != "a2a":
            raise ValueError(
                f"capacity must be None unless method is 'a2a', which alone drops tokens, got "
                f"capacity={capacity} with method={self.method!r}"
            )
