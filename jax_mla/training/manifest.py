"""A list of a folder's files with sizes and checksums, so that no flipped bit goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from jax_mla.checkpoint.files import flush

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Lists every file below `folder`, and flushes them, the list and the folders to disk."""
    files = {name: _entry(folder / name) for name in _names(folder)}
    for name in files:
        flush(folder / name)
    (folder / NAME).write_text(_text(files), encoding="utf-8")
    flush(folder / NAME)
    for directory in [path for path in folder.rglob("*") if path.is_dir()] + [folder]:
        flush(directory)


def find_damage(folder: Path) -> str | None:
    """How the folder differs from its manifest, or None. Reads every byte."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{NAME} is missing"
    except UnicodeDecodeError:
        return f"{NAME} is damaged"
    found = {name: _entry(folder / name) for name in _names(folder)}
    if text == _text(found):
        return None
    try:
        listed = json.loads(text)
    except ValueError:
        listed = None
    if not isinstance(listed, dict):
        return f"{NAME} is damaged"
    for name in sorted(found.keys() | listed.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not listed"
        if found[name] != listed[name]:
            return f"{name} has {found[name]} instead of {listed[name]}"
    return f"{NAME} is damaged"


def _names(folder: Path) -> set[str]:
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return files - {NAME}


def _entry(path: Path) -> str:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return f"{size} bytes, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _text(files: dict[str, str]) -> str:
    return json.dumps(files, indent=1, sort_keys=True) + "\n"
