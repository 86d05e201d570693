"""Schedules as data, the time they would take, and their pictures. Pure Python."""

import itertools
import math
import sys

import pytest

from jax_mla.training.pipeline import (
    Op,
    Schedule,
    gpipe,
    ideal_bubble,
    one_f_one_b,
    plot_timeline,
    simulate,
)

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (4, 2), (4, 4), (4, 8), (3, 7)]
BOTH = pytest.mark.parametrize("make", [gpipe, one_f_one_b])
of_sizes = pytest.mark.parametrize(("P", "M"), SIZES, ids=[f"P{p}-M{m}" for p, m in SIZES])


def written(schedule):
    return [" ".join(map(str, ops)) for ops in schedule.stages]


def test_gpipe_as_in_the_paper():
    assert written(gpipe(2, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_as_in_the_paper():
    assert written(one_f_one_b(4, 8)) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


@of_sizes
@BOTH
def test_the_order_issues_nothing_before_what_it_waits_for(make, P, M):
    schedule = make(P, M)
    place = {entry: i for i, entry in enumerate(schedule.order)}
    assert len(place) == 2 * P * M
    for (stage, op), i in place.items():
        if op.kind == "forward" and stage > 0:
            assert place[stage - 1, op] < i
        if op.kind == "backward":
            assert place[stage, Op("forward", op.micro_batch)] < i
            assert stage == P - 1 or place[stage + 1, op] < i
    for stage, ops in enumerate(schedule.stages):
        assert [op for s, op in schedule.order if s == stage] == list(ops)


@of_sizes
def test_1f1b_holds_as_many_micro_batches_as_stages_follow(P, M):
    held = [one_f_one_b(P, M).num_held(stage) for stage in range(P)]
    assert held == [min(P - stage, M) for stage in range(P)]
    assert [gpipe(P, M).num_held(stage) for stage in range(P)] == [M] * P


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["F0 B0"], "stage 0 must take each of 2 micro-batches .* it does F0 B0"),
        (["F0 F1 B0 B0"], "stage 0 must .* it does F0 F1 B0 B0"),
        (["F0 F1 B0 B1", ""], "stage 1 must .* it does nothing"),
        (["B0 F0 F1 B1"], "wait for each other: stage 0 with B0 cannot start"),
        (["F0 B0 F1 B1", "F0 F1 B0 B1"], "stage 0 with B0, stage 1 with F1 cannot start"),
    ],
    ids=["missing", "twice", "idle", "backward-first", "deadlock"],
)
def test_a_schedule_that_cannot_run_is_refused(stages, message):
    kinds = {"F": "forward", "B": "backward"}
    ops = tuple(tuple(Op(kinds[o[0]], int(o[1:])) for o in row.split()) for row in stages)
    with pytest.raises(ValueError, match=message):
        Schedule(2, ops)


@BOTH
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="num_micro_batches must be an integer of at least 1"):
        make(2, 0)
    with pytest.raises(ValueError, match="num_stages must be an integer of at least 1, got 0"):
        make(0, 2)


@of_sizes
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.5])
@BOTH
def test_equal_stages_have_the_bubble_of_the_formula(make, P, M, backward):
    timeline = simulate(make(P, M), forward=1.0, backward=backward)
    assert math.isclose(timeline.bubble, ideal_bubble(P, M), abs_tol=1e-12)
    assert math.isclose(timeline.end, (M + P - 1) * (1 + backward))


@BOTH
def test_no_stage_does_two_things_at_once(make):
    forward, backward = (1.0, 0.3, 2.0), (2.5, 2.0, 0.7)
    schedule = make(3, 5)
    timeline = simulate(schedule, forward=forward, backward=backward)
    ends = {(span.stage, span.op): span.end for span in timeline.spans}
    for stage in range(3):
        spans = [span for span in timeline.spans if span.stage == stage]
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
        assert math.isclose(
            sum(span.end - span.start for span in spans), 5 * (forward[stage] + backward[stage])
        )
    for span in timeline.spans:
        assert all(ends[needed] <= span.start for needed in schedule.waits_for(span.stage, span.op))
    assert timeline.bubble > ideal_bubble(3, 5)  # the slowest stage sets the pace


def test_a_stage_that_waits_is_a_gap():
    """By hand: P = 2, M = 2, a backward op as long as a forward op."""
    assert str(simulate(one_f_one_b(2, 2), forward=1.0, backward=1.0)).splitlines() == [
        "stage 0 |F0..F1..    B0..    B1..|",
        "stage 1 |    F0..B0..F1..B1..    |",
    ]


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        ({"forward": [1.0, 2.0]}, "forward has 2 durations, the schedule 3 stages"),
        ({"backward": 0.0}, "backward durations must be above 0, got 0"),
    ],
    ids=["too-few", "zero"],
)
def test_durations_that_make_no_sense_are_refused(durations, message):
    with pytest.raises(ValueError, match=message):
        simulate(gpipe(3, 2), **durations)


def test_the_plot_has_a_bar_for_every_op(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    timeline = simulate(one_f_one_b(3, 4))
    figure = plot_timeline(timeline, title="1F1B")
    (axes,) = figure.axes
    bars = {(p.get_x(), p.get_width(), p.get_y() + p.get_height() / 2) for p in axes.patches}
    assert bars == {(s.start, s.end - s.start, s.stage) for s in timeline.spans}
    assert sorted(int(text.get_text()) for text in axes.texts) == sorted(
        span.op.micro_batch for span in timeline.spans
    )
    assert axes.get_title() == "1F1B, bubble 33.3%"
    figure.savefig(tmp_path / "schedule.png")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jax-mla\[plot\]'"):
        plot_timeline(simulate(gpipe(2, 2)))
