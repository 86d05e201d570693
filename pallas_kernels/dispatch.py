"""Which implementation of an op runs: the one the caller names, or the first that can."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

Name = Literal["mosaic_gpu", "xla"]
NAMES: tuple[Name, ...] = ("mosaic_gpu", "xla")  # what `implementation=` may say, fastest first


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `why_not` sees shapes, dtypes and the device, never values."""

    name: Name
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **kwargs: None


class CannotRun(NotImplementedError):
    """Raised only by `select`, never by a kernel while tracing: a refusal, not a bug."""


Table = Sequence[Implementation]


def select(op: str, table: Table, requested: str | None, *args, **kwargs) -> Implementation:
    """Returns `requested`, or the first implementation in `table` that can run.

    Args:
      op: name of the op, for messages.
      table: implementations, fastest first; the last one can always run.
      requested: a name insists; None chooses.
      *args, **kwargs: arguments of the op; only shapes, dtypes and static options matter.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the named implementation cannot run this call here; the message says why.
    """
    if requested is None:
        return next(one for one in table if one.why_not(*args, **kwargs) is None)
    if requested not in NAMES:
        raise ValueError(
            f"{op}: implementation must be one of {list(NAMES)} or None, got {requested!r}"
        )
    if (reason := _why_not(op, table, requested, args, kwargs)) is not None:
        raise CannotRun(f"{op}: implementation {requested!r} cannot run here: {reason}")
    return next(one for one in table if one.name == requested)


def explain(op: str, table: Table, *args, **kwargs) -> list[tuple[str, str | None]]:
    """Returns, for every documented name, why it would not run this call, or None if it would."""
    return [(name, _why_not(op, table, name, args, kwargs)) for name in NAMES]


def call(op: str, table: Table, requested: str | None, *args, **kwargs) -> Any:
    """Runs the selected implementation; the trace and the profile name it (`mla_decode.xla`)."""
    chosen = select(op, table, requested, *args, **kwargs)
    with jax.named_scope(f"{op}.{chosen.name}"):
        return chosen.run(*args, **kwargs)


def _why_not(op: str, table: Table, name: str, args, kwargs) -> str | None:
    for one in table:
        if one.name == name:
            return one.why_not(*args, **kwargs)
    return f"this version has no {name} kernel for {op} yet"
