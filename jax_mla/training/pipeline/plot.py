"""A timeline as a figure: stages from top to bottom, time to the right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax_mla.training.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"forward": "#4c78a8", "backward": "#f2a154"}


def plot_timeline(timeline: Timeline, *, title: str | None = None) -> Figure:
    """Draws every op as a bar with the number of its micro-batch; gaps are the bubble.

    Returns:
      A matplotlib Figure that belongs to no window; `figure.savefig(path)` writes it.

    Raises:
      ImportError: matplotlib, the extra `plot`, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib, which is not installed: pip install 'jax-mla[plot]'"
        ) from error
    figure = Figure(figsize=(10, 0.6 * timeline.num_stages + 1), layout="constrained")
    axes = figure.subplots()
    for kind, color in _COLORS.items():
        spans = [span for span in timeline.spans if span.op.kind == kind]
        axes.barh(
            [span.stage for span in spans],
            [span.end - span.start for span in spans],
            left=[span.start for span in spans],
            color=color,
            edgecolor="white",
            label=kind,
        )
    for span in timeline.spans:
        middle = (span.start + span.end) / 2
        axes.text(middle, span.stage, str(span.op.micro_batch), ha="center", va="center")
    axes.set_yticks(range(timeline.num_stages), [f"stage {i}" for i in range(timeline.num_stages)])
    axes.invert_yaxis()
    axes.set_xlabel("time")
    axes.set_title(f"{title + ', ' if title else ''}bubble {timeline.bubble:.1%}")
    axes.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, 1.2), frameon=False)
    return figure
