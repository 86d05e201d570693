"""Small files of a checkpoint: JSON in and out, flushed to disk. No jax."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any


def parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice; `what` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(keys) != len(result := dict(pairs)):
            twice = next(key for key, count in collections.Counter(keys).items() if count > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object but {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FileNotFoundError or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return parse_json(path.read_bytes(), str(path))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object and flushes it to disk."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    flush(path)


def flush(path: Path) -> None:
    """Makes a file, or the entries of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
