"""What a config field may hold: one annotated type per rule, so that each rule is stated once.

    hidden_size: Size
    q_lora_rank: Size | None

`checks_of` reads the annotations of a dataclass; a field that may be None passes with None.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

from jax_mla.checks.sizes import check_one_of

Check = Callable[[str, Any], None]  # name, value; raises ValueError
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(DTYPE_BYTES)  # that parameters and caches may have


def dtype_name(dtype: Any) -> Any:
    """The name of a dtype or of a scalar type, such as jnp.bfloat16; anything else unchanged."""
    name = getattr(dtype, "__name__", None) or getattr(dtype, "name", None)
    return name if isinstance(name, str) else dtype


def is_number(value: Any) -> bool:
    """A finite int or float; booleans are none, nor are integers beyond the range of floats."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_token_id(value: Any) -> bool:
    """An integer of 32 bits; published configs may say -1 for no padding."""
    return type(value) is int and -(2**31) <= value < 2**31


def _size(name: str, value: Any) -> None:
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _count(name: str, value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")


def _positive(name: str, value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {_short(value)}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def _token_id(name: str, value: Any) -> None:
    if not is_token_id(value):
        raise ValueError(f"{name} must be a token id or null, got {value!r}")


def _token_ids(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(is_token_id(i) for i in value):
        raise ValueError(f"{name} must be a tuple of token ids, got {value!r}")


def _short(value: Any) -> str:
    return "an integer beyond 1e308" if type(value) is int and value > 10**30 else repr(value)


Size = Annotated[int, _size]
Count = Annotated[int, _count]
PositiveFloat = Annotated[float, _positive]
PositiveNumber = Annotated[int, _positive]  # not made a float: a checkpoint's readers want an int
Flag = Annotated[bool, _flag]
TokenId = Annotated[int, _token_id]
TokenIds = Annotated[tuple[int, ...], _token_ids]


def one_of(choices: tuple[str, ...]) -> Check:
    """The rule of a field whose choices are a tuple; a Literal is its own rule."""
    return functools.partial(check_one_of, choices=choices)


def checks_of(cls: type) -> dict[str, Check]:
    """The rule of every field of a dataclass that has one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: check for name, hint in hints.items() if (check := _check_of(hint)) is not None}


def floats_of(cls: type) -> frozenset[str]:
    """The fields of a dataclass that hold floats: JSON does not tell 40 from 40.0."""
    hints = typing.get_type_hints(cls)
    return frozenset(n for n, hint in hints.items() if float in (hint, *typing.get_args(hint)))


def _check_of(hint: Any) -> Check | None:
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[1]
    if typing.get_origin(hint) is Literal:
        return one_of(typing.get_args(hint))
    options = typing.get_args(hint)
    if type(None) not in options:
        return None
    checks = [check for option in options if (check := _check_of(option)) is not None]
    return None if not checks else functools.partial(_check_optional, check=checks[0])


def _check_optional(name: str, value: Any, check: Check) -> None:
    if value is not None:
        check(name, value)
