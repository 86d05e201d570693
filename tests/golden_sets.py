"""The golden sets: small checkpoints, and what the torch reference computes with each.

`golden/README.md` says what each set covers and how it was made.
"""

import json
from pathlib import Path

import numpy as np

from jax_mla import DeepSeekConfig

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def read_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as file:
        return dict(file)


def sets_with(key: str) -> list[str]:
    """Names of the sets that have an array of this name."""
    return [name for name in NAMES if key in np.load(GOLDEN / name / "golden.npz").files]


def read_config(name: str) -> DeepSeekConfig:
    return DeepSeekConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
