"""Published checkpoints in and out: Hugging Face folders of safetensors <-> the parameter dict.

Reading top down: `files` (JSON), `safetensors_file` (one file), `folder` (a folder of them),
`published` (what a config says they hold), `matching` (the two agree), `reading` (slices of a
leaf), `loading` and `saving`.
Only the last two import jax, and only when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_mla.checkpoint.loading import load
    from jax_mla.checkpoint.saving import save

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from jax_mla.checkpoint.loading import load

        return load
    if name == "save":
        from jax_mla.checkpoint.saving import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
