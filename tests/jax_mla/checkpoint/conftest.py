"""Checkpoint folders for these tests: the golden ones, and copies with something changed."""

import json
import shutil

import numpy as np
import pytest
from golden_sets import GOLDEN
from safetensors.numpy import save_file

from jax_mla.checkpoint.safetensors_file import read_header


@pytest.fixture
def golden():
    return GOLDEN


@pytest.fixture
def stored():
    """All tensors of a file by name, as numpy arrays in their stored dtype."""

    def read(path):
        return {
            name: np.array(tensor.read(tensor.shape, tuple((0, n) for n in tensor.shape)))
            for name, tensor in read_header(path).items()
        }

    return read


@pytest.fixture
def edited(tmp_path, stored):
    """A copy of a golden folder after `change` has edited its dict of tensors in place."""

    def make(name, change=lambda tensors: None, **config):
        folder = tmp_path / name
        folder.mkdir()
        tensors = stored(GOLDEN / name / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        published = json.loads((GOLDEN / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(published | config))
        return folder

    return make


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards and an index: shard 1 holds a, shard 2 holds b."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(GOLDEN / "v3" / "config.json", folder)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for tensor, name in zip("ab", names, strict=True):
        save_file({tensor: np.zeros(3, np.float32)}, folder / name)
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
