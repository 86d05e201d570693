"""Multimodal checkpoints: the text model inside, and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

TEXT_KEYS = ("text_config", "language_config")
# What the whole file may say for its text part.
_SHARED = (
    "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """How one multimodal model_type contains a text model.

    prefixes: the beginnings of the text model's tensor names and what replaces them.
    left_out: the beginnings of all other names.
    text_family: the model_type of a text part that names none.
    """

    prefixes: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    text_family: str | None = None

    def text_name(self, name: str) -> str | None:
        """The name that a tensor has in a checkpoint of the text model; None if it is not of it."""
        if name.startswith(self.left_out):
            return None
        for prefix, replacement in self.prefixes:
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return name


_KIMI = Wrapper(
    prefixes=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    left_out=(
        "vision_tower.", "mm_projector.", "multi_modal_projector.",
        "model.vision_tower.", "model.mm_projector.", "model.multi_modal_projector.",
    ),
)  # fmt: skip
WRAPPERS = {
    "kimi_k25": _KIMI,
    "kimi_vl": _KIMI,
    "deepseek_vl_v2": Wrapper(
        prefixes=(("language.", ""),),
        left_out=("vision.", "projector.", "image_newline", "view_seperator", "tile_indicators"),
        text_family="deepseek_v2",
    ),
}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """How the file of a multimodal model contains its text model; None for other models."""
    model_type = config.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model of a multimodal one; the config itself of other models.

    Raises:
      ValueError: the file holds no text model, or says something else outside of it than inside.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    model_type = config["model_type"]
    found = [key for key in TEXT_KEYS if config.get(key) is not None]
    if len(found) != 1 or not isinstance(config[found[0]], Mapping):
        raise ValueError(
            f"a {model_type} must have one of {' and '.join(TEXT_KEYS)}, an object, got "
            f"{' and '.join(f'{config.get(key)!r:.60}' for key in TEXT_KEYS)}"
        )
    text = dict(config[found[0]])
    if text.get("model_type") in (None, ""):
        text["model_type"] = wrapper.text_family
    for key in _SHARED:
        inside, outside = text.get(key), config.get(key)
        if outside is None:
            continue
        if inside is not None and _as_list(inside) != _as_list(outside):
            raise ValueError(
                f"{key} of a {model_type} must be the same outside and inside of {found[0]}, got "
                f"{outside!r:.60} and {inside!r:.60}"
            )
        text[key] = outside if inside is None else inside
    return text


def _as_list(value: Any) -> list[Any]:
    """A single token id as a list of one."""
    return value if isinstance(value, list) else [value]
