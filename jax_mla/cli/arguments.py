"""Words of the command line as values: numbers, addresses, and which config is meant."""

import argparse
import math
from pathlib import Path

from jax_mla.checkpoint.files import read_json
from jax_mla.checkpoint.folder import read_model_config
from jax_mla.config import DeepSeekConfig, presets

PRESETS = ("tiny", "v2_lite", "v2", "v3", "kimi_k2")


def positive(word: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {word!r}")
    return int(word)


def natural(word: str) -> int:
    """An argparse type: an integer of at least 0."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {word!r}")
    return int(word)


def number_above_0(word: str) -> float:
    """An argparse type: a finite number above 0."""
    if not 0 < (value := _number(word)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {word!r}")
    return value


def number_from_0(word: str) -> float:
    """An argparse type: a finite number of at least 0."""
    if not 0 <= (value := _number(word)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {word!r}")
    return value


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def address(word: str) -> str:
    """An argparse type: `host:1234`."""
    host, _, port = word.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {word!r}")
    return word


CONFIG_HELP = f"{', '.join(PRESETS)}, a config.json, or a folder that has one"


def config_named(word: str) -> DeepSeekConfig:
    """The config that a word names: a preset, a config.json, or a folder that has one.

    Raises:
      FileNotFoundError: it is none of them.
      ValueError: the file is malformed, or not the config of a model that this library computes.
    """
    if word in PRESETS:
        return getattr(presets, word)()
    path = Path(word)
    if not path.exists():
        raise FileNotFoundError(f"{word} is missing, and no preset: {', '.join(PRESETS)}")
    if path.is_dir():
        return read_model_config(path)
    return DeepSeekConfig.from_hf(read_json(path))


def config_folder(word: str) -> Path | None:
    """The folder that the argument names; None for a preset, which has none."""
    if word in PRESETS:
        return None
    path = Path(word)
    return path if path.is_dir() else path.parent
