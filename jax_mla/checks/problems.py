"""Many problems, one message: what is missing, unexpected and of the wrong shape. No jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SHOWN = 8


def shortened(items: Sequence[str]) -> str:
    """The first few items, and how many more there are."""
    shown = "; ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}; and {len(items) - _SHOWN} more"


def refuse(subject: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raises one ValueError that lists all problems by kind; does nothing if there are none."""
    lines = [
        f"\n  {kind} ({len(items)}): {shortened(items)}"
        for kind, items in problems.items()
        if items
    ]
    if lines:
        raise ValueError(f"{subject}:{''.join(lines)}")


def differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """How named shapes differ from those expected, by kind of difference, for `refuse`."""
    return {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrong shape": [
            f"{name} is {[*found[name]]}, expected {[*shape]}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
