"""What a model costs and whether it is right: layouts, collectives, memory, operations, parity."""

import importlib
from typing import TYPE_CHECKING, Any

# Imported on first use: sizes and operations are computed without jax.
_HOME = {
    "Comparison": "parity",
    "ServingBytes": "memory",
    "TrainingBytes": "memory",
    "cache_bytes_per_token": "cache_size",
    "compare_with_golden": "parity",
    "compare_with_itself": "parity",
    "explain_collectives": "collectives",
    "explain_sharding": "placement",
    "flops_per_token": "flops",
    "serving_bytes": "memory",
    "training_bytes": "memory",
}

if TYPE_CHECKING:
    from jax_mla.analysis.cache_size import cache_bytes_per_token
    from jax_mla.analysis.collectives import explain_collectives
    from jax_mla.analysis.flops import flops_per_token
    from jax_mla.analysis.memory import ServingBytes, TrainingBytes, serving_bytes, training_bytes
    from jax_mla.analysis.parity import Comparison, compare_with_golden, compare_with_itself
    from jax_mla.analysis.placement import explain_sharding

__all__ = [
    "Comparison",
    "ServingBytes",
    "TrainingBytes",
    "cache_bytes_per_token",
    "compare_with_golden",
    "compare_with_itself",
    "explain_collectives",
    "explain_sharding",
    "flops_per_token",
    "serving_bytes",
    "training_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
