"""Schedules as data: for every stage, the order of its forward and backward ops."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

from jax_mla.checks.sizes import check_positive


class Op(NamedTuple):
    """The forward or backward pass of one micro-batch through one stage."""

    kind: Literal["forward", "backward"]
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.micro_batch}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The ops of every stage, in order. Hashable.

    A forward op waits for the forward op of the stage before. A backward op waits for the forward
    op of its own stage and for the backward op of the stage after.

    Raises:
      ValueError: a stage does not run every op exactly once, or the stages would wait for each
        other forever.
    """

    num_micro_batches: int
    stages: tuple[tuple[Op, ...], ...]

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        check_positive(num_stages=len(self.stages), num_micro_batches=self.num_micro_batches)
        wanted = {
            Op(kind, i) for kind in ("forward", "backward") for i in range(self.num_micro_batches)
        }
        for stage, ops in enumerate(self.stages):
            if len(ops) != len(wanted) or set(ops) != wanted:
                raise ValueError(
                    f"stage {stage} must take each of {self.num_micro_batches} micro-batches "
                    f"forward and backward once, it does {' '.join(map(str, ops)) or 'nothing'}"
                )
        self._ordered()

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @functools.cached_property
    def order(self) -> tuple[tuple[int, Op], ...]:
        """All ops with their stages, each after the ops that it waits for."""
        return self._ordered()

    def _ordered(self) -> tuple[tuple[int, Op], ...]:
        order, done = [], set()
        queues = [list(reversed(ops)) for ops in self.stages]
        while any(queues):
            ready = [
                (stage, queue[-1])
                for stage, queue in enumerate(queues)
                if queue and done.issuperset(self.waits_for(stage, queue[-1]))
            ]
            if not ready:
                stuck = ", ".join(f"stage {s} with {q[-1]}" for s, q in enumerate(queues) if q)
                raise ValueError(f"the stages wait for each other: {stuck} cannot start")
            for stage, _ in ready:
                queues[stage].pop()
            done.update(ready)
            order += ready
        return tuple(order)

    def waits_for(self, stage: int, op: Op) -> list[tuple[int, Op]]:
        """The ops, with their stages, whose results an op needs."""
        if op.kind == "forward":
            return [(stage - 1, op)] if stage > 0 else []
        own = (stage, Op("forward", op.micro_batch))
        return [own] if stage == self.num_stages - 1 else [own, (stage + 1, op)]

    def num_held(self, stage: int) -> int:
        """Peak number of micro-batches whose forward op has run and whose backward op has not."""
        held = most = 0
        for op in self.stages[stage]:
            held += 1 if op.kind == "forward" else -1
            most = max(most, held)
        return most


ScheduleMaker = Callable[[int, int], Schedule]  # from num_stages and num_micro_batches


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """All forward ops, then all backward ops, each in the order of the micro-batches.

    Every stage holds the activations of all micro-batches.

    Source: Huang et al., arXiv 1811.06965.
    """
    check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    forward = [Op("forward", i) for i in range(num_micro_batches)]
    backward = [Op("backward", i) for i in range(num_micro_batches)]
    return Schedule(num_micro_batches, (tuple(forward + backward),) * num_stages)


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """Alternates one forward and one backward op once the pipeline is full (1F1B, with a flush).

    Stage s holds the activations of at most num_stages - s micro-batches: it starts with as many
    forward ops as there are stages after it. The bubble is as large as that of `gpipe`.

    Source: Narayanan et al., arXiv 1806.03377 (1F1B) and 2104.04473 (with a flush).
    """
    check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)

    def ops_of(stage: int) -> tuple[Op, ...]:
        first = min(num_stages - 1 - stage, num_micro_batches)
        ops = [Op("forward", i) for i in range(first)]
        for i in range(num_micro_batches - first):
            ops += [Op("forward", first + i), Op("backward", i)]
        ops += [Op("backward", i) for i in range(num_micro_batches - first, num_micro_batches)]
        return tuple(ops)

    return Schedule(num_micro_batches, tuple(map(ops_of, range(num_stages))))
