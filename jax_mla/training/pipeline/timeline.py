"""When each op of a schedule would run, and what fraction of the time stages are idle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax_mla.checks.sizes import check_positive
from jax_mla.training.pipeline.schedule import Op, Schedule


@dataclasses.dataclass(frozen=True)
class Span:
    """One op on a stage; start and end in the unit of the durations."""

    stage: int
    op: Op
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The spans of all ops, in an order in which they could have been issued."""

    num_stages: int
    spans: tuple[Span, ...]

    @property
    def end(self) -> float:
        """When the last op ends; the first one starts at 0."""
        return max(span.end for span in self.spans)

    @property
    def bubble(self) -> float:
        """The fraction of time in which stages are idle: 1 - busy / (num_stages * end)."""
        busy = sum(span.end - span.start for span in self.spans)
        return 1 - busy / (self.num_stages * self.end)

    def __str__(self) -> str:
        """One line per stage, at most 100 columns wide, with spaces where it is idle."""
        width = min(100, round(4 * self.end / min(s.end - s.start for s in self.spans)))
        lines = [[" "] * width for _ in range(self.num_stages)]
        for span in self.spans:
            start, end = (round(time / self.end * width) for time in (span.start, span.end))
            label = str(span.op) if len(str(span.op)) <= end - start else ""
            lines[span.stage][start:end] = label.ljust(end - start, ".")
        return "\n".join(f"stage {i} |{''.join(line)}|" for i, line in enumerate(lines))


def simulate(
    schedule: Schedule,
    *,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
) -> Timeline:
    """Starts every op as soon as its stage is free and the ops that it waits for are done.

    Moving activations takes no time here.

    Args:
      forward, backward: duration of an op, in any unit: one number, or one per stage.

    Raises:
      ValueError: there is not one duration per stage, or one is not above 0.
    """
    durations: dict[str, Sequence[float]] = {}
    for kind, given in {"forward": forward, "backward": backward}.items():
        each = list(given) if isinstance(given, Sequence) else [given] * schedule.num_stages
        if len(each) != schedule.num_stages:
            raise ValueError(
                f"{kind} has {len(each)} durations, the schedule {schedule.num_stages} stages"
            )
        if not min(each) > 0:
            raise ValueError(f"{kind} durations must be above 0, got {min(each)}")
        durations[kind] = each
    free, spans = [0.0] * schedule.num_stages, {}
    for stage, op in schedule.order:
        earliest = [spans[needed].end for needed in schedule.waits_for(stage, op)]
        start = max([free[stage], *earliest])
        free[stage] = start + durations[op.kind][stage]
        spans[stage, op] = Span(stage, op, start, free[stage])
    return Timeline(schedule.num_stages, tuple(spans.values()))


def ideal_bubble(num_stages: int, num_micro_batches: int) -> float:
    """(P - 1) / (M + P - 1): the bubble of both schedules if all stages take equally long.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2, there as a fraction of the ideal time.
    """
    check_positive(num_stages=num_stages, num_micro_batches=num_micro_batches)
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)
