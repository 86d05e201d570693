"""The rotary part of a published config.json, in its old and new spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_mla.config.fields import is_number
from jax_mla.config.rope import RopeScaling

_YARN = frozenset({
    "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
})  # fmt: skip
_LONGROPE = frozenset({
    "factor", "mscale", "mscale_all_dim", "attention_factor", "short_factor", "long_factor",
})  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"
_KNOWN = _YARN | _LONGROPE | {
    _ORIGINAL, "rope_theta", "rope_type", "type", "partial_rotary_factor", "finetuned",
}  # fmt: skip


def read_rope(given: Mapping[str, Any], longest: Any) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` + `rope_scaling` (old) or `rope_parameters` (new).

    Args:
      given: the file's values by field.
      longest: its max_position_embeddings, or the family's.

    Raises:
      ValueError: a part is not computed, or two spellings disagree; both values are named.
    """
    spelled = {
        key: _read(rope, given, longest)
        for key in ("rope_scaling", "rope_parameters")
        if (rope := given.get(key))
    }
    found = list(spelled.values()) or [_read({}, given, longest)]
    if found[0] != found[-1]:
        raise ValueError(
            f"rope_scaling={given['rope_scaling']!r} and "
            f"rope_parameters={given['rope_parameters']!r} must mean the same"
        )
    return found[0]


def _read(rope: Any, given: Mapping[str, Any], longest: Any) -> tuple[Any, RopeScaling | None]:
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling must be an object with named values, got {rope!r}")
    for key, value in rope.items():
        if value is not None and key not in _KNOWN:
            raise ValueError(f"rope parameters with {key}={value!r} are not supported")
    if (partial := rope.get("partial_rotary_factor")) not in (1.0, None):
        raise ValueError(
            f"rope parameters with partial_rotary_factor={partial!r} are not supported, only 1.0"
        )
    theta = _one("rope_theta", given.get("rope_theta"), rope.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    rope_type = _one("the type of rope", rope.get("rope_type"), rope.get("type")) or "default"
    if rope_type == "default":
        return theta, None
    original = _one(_ORIGINAL, given.get(_ORIGINAL), rope.get(_ORIGINAL)) or longest
    for key, value in ((_ORIGINAL, original), ("max_position_embeddings", longest)):
        if not is_number(value) or value < 1 or value != int(value):
            raise ValueError(f"{key} must be an integer of at least 1, got {value!r}")
    if rope_type == "longrope" and longest > original:
        raise ValueError(
            f"longrope with max_position_embeddings={longest} beyond "
            f"original_max_position_embeddings={original} is not supported"
        )
    fields = _LONGROPE if rope_type == "longrope" else _YARN
    values = {key: _as_floats(rope[key]) for key in fields & rope.keys() if rope[key] is not None}
    values.setdefault("factor", longest / original)
    for key in ("beta_fast", "beta_slow"):  # 0 means the default
        if not values.get(key):
            values.pop(key, None)
    return theta, RopeScaling(rope_type, original_max_position_embeddings=int(original), **values)


def _one(name: str, first: Any, second: Any) -> Any:
    """The one value that is given in two places; None if there is none."""
    if first is not None and second is not None and first != second:
        raise ValueError(f"{name} is given twice, as {first!r} and as {second!r}")
    return second if first is None else first


def _as_floats(value: Any) -> Any:
    """Numbers as floats, lists as tuples; what is neither is left for RopeScaling to refuse."""
    if isinstance(value, list):
        return tuple(map(_as_floats, value))
    return float(value) if type(value) is int and is_number(value) else value


def write_rope(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a RopeScaling as a `rope_scaling` that every reader knows."""
    rope_type = scaling["rope_type"]
    fields = (_LONGROPE if rope_type == "longrope" else _YARN) | {_ORIGINAL}
    out = {k: v for k, v in scaling.items() if k in fields and v is not None}
    for key in ("short_factor", "long_factor"):
        if key in out:
            out[key] = list(out[key])
    return out | {"type": rope_type, "rope_type": rope_type}
