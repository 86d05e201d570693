"""Many problems, one message."""

from collections.abc import Mapping, Sequence

_SHOWN = 8


def shortened(items: Sequence[str]) -> str:
    """The first few items, and how many more there are."""
    shown = "; ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}; and {len(items) - _SHOWN} more"


def refuse(subject: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raises one ValueError that lists every kind of problem which has occurred; none, no error."""
    lines = [
        f"\n  {kind} ({len(items)}): {shortened(items)}"
        for kind, items in problems.items()
        if items
    ]
    if lines:
        raise ValueError(f"{subject}:{''.join(lines)}")
